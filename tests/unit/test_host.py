from __future__ import annotations

from pathlib import Path

from sllmctl.core.host import available_memory_bytes

GIB = 2**30


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {64 * GIB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_it_is_what_the_kernel_has_available(tmp_path: Path) -> None:
    assert available_memory_bytes(machine(tmp_path, "0::/\n", {})) == 64 * GIB


def test_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/pod/container\n",
        {
            "pod/memory.max": f"{8 * GIB}\n",
            "pod/memory.current": f"{5 * GIB}\n",
            "pod/memory.stat": f"anon 1\nfile {GIB}\n",
            "pod/container/memory.max": "max\n",
            "pod/container/memory.current": f"{GIB}\n",
        },
    )
    assert available_memory_bytes(root) == 4 * GIB  # 8 - 5, and the page cache can go


def test_a_container_sees_its_own_cgroup_at_the_root(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/../../kubepods/pod1\n",
        {"memory.max": f"{2 * GIB}\n", "memory.current": "0\n", "memory.stat": ""},
    )
    assert available_memory_bytes(root) == 2 * GIB


def test_cgroup_v1_is_asked_in_its_own_words(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "12:cpu,cpuacct:/x\n9:memory:/docker/1\n",
        {
            "memory/docker/1/memory.limit_in_bytes": f"{3 * GIB}\n",
            "memory/docker/1/memory.usage_in_bytes": f"{GIB}\n",
            "memory/docker/1/memory.stat": "cache 0\ntotal_cache 0\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert available_memory_bytes(root) == 2 * GIB


def test_files_in_memory_are_no_page_cache_that_can_go(tmp_path: Path) -> None:
    """A cgroup counts a tmpfs, and the pool of another store, among its cached files."""
    new = machine(
        tmp_path / "v2",
        "0::/pod\n",
        {
            "pod/memory.max": f"{8 * GIB}\n",
            "pod/memory.current": f"{6 * GIB}\n",
            "pod/memory.stat": f"file {5 * GIB}\nshmem {4 * GIB}\n",
        },
    )
    old = machine(
        tmp_path / "v1",
        "9:memory:/pod\n",
        {
            "memory/pod/memory.limit_in_bytes": f"{8 * GIB}\n",
            "memory/pod/memory.usage_in_bytes": f"{6 * GIB}\n",
            "memory/pod/memory.stat": f"total_cache {5 * GIB}\ntotal_shmem {4 * GIB}\n",
        },
    )
    assert available_memory_bytes(new) == available_memory_bytes(old) == 3 * GIB


def test_files_that_processes_have_mapped_can_be_left_out(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/\n",
        {
            "memory.max": f"{40 * GIB}\n",
            "memory.current": f"{30 * GIB}\n",
            "memory.stat": f"file {20 * GIB}\nshmem {GIB}\nfile_mapped {8 * GIB}\n",
        },
    )
    assert available_memory_bytes(root) == (40 - 30 + 20 - 1) * GIB
    assert available_memory_bytes(root, mapped=False) == (40 - 30 + 20 - 8) * GIB
    kib = GIB // 1024
    (root / "proc/meminfo").write_text(
        f"MemAvailable: {20 * kib} kB\nMapped: {9 * kib} kB\nShmem: {2 * kib} kB\n"
    )
    assert available_memory_bytes(root) == 20 * GIB
    assert available_memory_bytes(root, mapped=False) == 13 * GIB
