"""Converting a directory of safetensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from sllmctl.core import scan
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.fileio import Buffer
from sllmctl.core.manifest import Origin, read_manifest
from sllmctl.core.write import assemble
from sllmctl.core.write.convert import convert
from sllmctl.core.write.layout import alignment_of
from sllmctl.errors import CheckpointError, CheckpointNotFound, ChecksumMismatch, ConfigError
from tests.conftest import some_tensors, write_checkpoint
from tests.convert.conftest import TENSORS, assert_same_tensors, files_of, only_child


def test_a_converted_checkpoint_is_the_source_bit_by_bit(source: Path, target: Path) -> None:
    before = files_of(source)
    result = convert(source, target)
    assert_same_tensors(target, TENSORS)
    assert (result.path, result.tensors, result.shards) == (target, len(TENSORS), 1)
    assert result.bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert not result.already
    assert result.warnings == ()
    assert files_of(source) == before
    assert only_child(target.parent) == target


def test_everything_else_goes_along(source: Path, target: Path) -> None:
    convert(source, target)
    found = files_of(target)
    assert sorted(found) == [
        "config.json",
        "empty.txt",
        "model.safetensors",
        "pooling/deep/config.json",
        "sllmctl.json",
        "tokenizer.json",
    ]
    for name in ("config.json", "empty.txt", "pooling/deep/config.json", "tokenizer.json"):
        assert found[name] == (source / name).read_bytes()


def test_small_shards_have_an_index_that_transformers_reads(source: Path, target: Path) -> None:
    result = convert(source, target, max_shard_bytes=8000)
    assert result.shards > 1
    assert_same_tensors(target, TENSORS)
    names = [shard.path.name for shard in open_checkpoint(target).shards]
    assert names == [
        f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)
    ]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.bytes
    assert index["weight_map"].keys() == TENSORS.keys()


def test_the_manifest_says_what_was_written(source: Path, target: Path) -> None:
    origin = Origin(hub="huggingface", name="org/model", revision="main")
    result = convert(source, target, max_shard_bytes=8000, origin=origin)
    manifest = read_manifest(target)
    assert manifest is not None
    assert manifest.origin == origin
    assert manifest.dtype == "keep"
    assert (manifest.tensors, manifest.bytes) == (result.tensors, result.bytes)
    assert result.source == "org/model"
    for shard in manifest.shards:
        content = (target / shard.name).read_bytes()
        assert shard.size == len(content)
        assert shard.chunks == xxhash.xxh3_128_hexdigest(content)
        assert shard.digest == xxhash.xxh3_128_hexdigest(bytes.fromhex(shard.chunks))
    digests = {file.name: file.digest for file in manifest.files}
    assert digests.keys() == files_of(target).keys() - {s.name for s in manifest.shards} - {
        "sllmctl.json"
    }
    for name, digest in digests.items():
        assert digest == xxhash.xxh3_128_hexdigest((target / name).read_bytes())


def test_chunks_are_digested_on_a_grid_of_16_mib(tmp_path: Path, target: Path) -> None:
    tensors = {
        f"layers.{n}.w": torch.randn(1 + n, 600_000).to(torch.bfloat16) for n in range(5)
    } | {"odd": torch.arange(3, dtype=torch.uint8), "wide": torch.randn(6 * 2**20)}
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors})
    convert(source, target)
    assert_same_tensors(target, tensors)
    manifest = read_manifest(target)
    assert manifest is not None
    (shard,) = manifest.shards
    content = (target / shard.name).read_bytes()
    step = 16 * 2**20
    assert len(shard.chunks) == 32 * -(-len(content) // step) >= 64
    assert shard.chunks == "".join(
        xxhash.xxh3_128_hexdigest(content[start : start + step])
        for start in range(0, len(content), step)
    )
    for entry in open_checkpoint(target).tensors.values():
        assert entry.offset % alignment_of(entry.nbytes) == 0


def test_a_cold_source_is_read_directly_and_right(tmp_path: Path, target: Path) -> None:
    # 3 MB tensors at odd places: direct reads go through an aligned buffer.
    tensors = {f"t{n}": torch.randn(777_777 + n) for n in range(6)} | {"x": torch.zeros(1)}
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors})
    path = source / "model.safetensors"
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    convert(source, target)
    assert_same_tensors(target, tensors)


def test_a_source_on_a_filesystem_without_direct_reads(target: Path) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("/dev/shm cannot be written")
    source = Path("/dev/shm") / f"sllmctl-test-{os.getpid()}"
    try:
        write_checkpoint(source, {"model.safetensors": {"a": torch.randn(10**6)} | TENSORS})
        convert(source, target)
        convert(target, source.with_name(source.name + "-out"))
        for place in (target, source.with_name(source.name + "-out")):
            assert open_checkpoint(place).tensors.keys() == {"a", *TENSORS}
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(source.with_name(source.name + "-out"), ignore_errors=True)


def test_converting_a_converted_checkpoint_writes_the_same_shards(
    source: Path, target: Path, tmp_path: Path
) -> None:
    convert(source, target)
    again = tmp_path / "again"
    convert(target, again)
    first, second = files_of(target), files_of(again)
    assert first.pop("sllmctl.json") != second.pop("sllmctl.json")
    assert first == second


def test_metadata_and_ties_of_the_source_are_kept(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    metadata = {"format": "pt", "lm_head.weight": "embed.weight", "note": "a text"}
    save_file({"embed.weight": torch.ones(3)}, source / "model.safetensors", metadata=metadata)
    result = convert(source, target)
    checkpoint = open_checkpoint(target)
    assert checkpoint.aliases == {"lm_head.weight": "embed.weight"}
    assert checkpoint.metadata == {"note": "a text"}
    assert result.tensors == 1


def test_a_single_file_can_be_converted(source: Path, target: Path) -> None:
    convert(source / "model-00001-of-00002.safetensors", target)
    assert_same_tensors(target, some_tensors(0))
    assert sorted(files_of(target)) == ["model.safetensors", "sllmctl.json"]


def test_it_is_there_already(source: Path, target: Path) -> None:
    convert(source, target, max_shard_bytes=10**6)
    before = files_of(target)
    again = convert(source, target, max_shard_bytes=10**6)
    assert again.already
    assert (again.tensors, again.shards) == (len(TENSORS), 1)
    assert files_of(target) == before


def test_other_options_ask_for_force(source: Path, target: Path) -> None:
    convert(source, target)
    before = files_of(target)
    with pytest.raises(ConfigError, match="is there already") as caught:
        convert(source, target, max_shard_bytes=10**6)
    assert "--force" in str(caught.value.hint)
    assert files_of(target) == before


def test_a_changed_source_asks_for_force(source: Path, target: Path) -> None:
    convert(source, target)
    (source / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is there already"):
        convert(source, target)
    assert not convert(source, target, force=True).already
    assert (target / "config.json").read_text() == "{}"


def test_a_pinned_revision_is_known_by_names_and_sizes(source: Path, target: Path) -> None:
    origin = Origin(hub="huggingface", name="org/model", revision="0123456789" * 4)
    convert(source, target, origin=origin)
    os.utime(source / "config.json", ns=(1, 1))
    assert convert(source, target, origin=origin).already
    other = Origin(hub="huggingface", name="org/model", revision="f" * 40)
    with pytest.raises(ConfigError, match="is there already"):
        convert(source, target, origin=other)


def test_a_damaged_target_is_not_there_already(source: Path, target: Path) -> None:
    convert(source, target)
    os.truncate(target / "model.safetensors", 5000)
    with pytest.raises(ConfigError, match="is there already"):
        convert(source, target)
    convert(source, target, force=True)
    assert_same_tensors(target, TENSORS)


@pytest.mark.parametrize("inner", ["", "sub", "sub/deeper"])
def test_source_and_output_must_lie_apart(source: Path, inner: str) -> None:
    with pytest.raises(ConfigError, match="same directory|is inside"):
        convert(source, source / inner)
    with pytest.raises(ConfigError, match="same directory|is inside"):
        convert(source, source.parent)
    link = source.parent / "link"
    link.symlink_to(source)
    with pytest.raises(ConfigError, match="same directory|is inside"):
        convert(source, link / inner)


def test_an_unknown_dtype_is_refused(source: Path, target: Path) -> None:
    with pytest.raises(ConfigError, match="`int4` is not a dtype to convert to"):
        convert(source, target, dtype="int4")


def test_a_directory_without_weights_is_refused(tmp_path: Path, target: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"no weights in .*: looked for \*.safetensors"):
        convert(tmp_path / "empty", target)
    with pytest.raises(CheckpointNotFound, match="there is no directory"):
        convert(tmp_path / "missing", target)
    assert not target.parent.exists()


def test_a_damaged_source_leaves_nothing(source: Path, target: Path) -> None:
    os.truncate(source / "model-00002-of-00002.safetensors", 3000)
    with pytest.raises(CheckpointError, match="is it truncated"):
        convert(source, target)
    assert not target.parent.exists()


def test_a_source_that_changes_meanwhile_is_noticed(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards = assemble.write_shards

    def slip_in(*args: object, **kwargs: object) -> None:
        write_shards(*args, **kwargs)  # type: ignore[arg-type]
        (source / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(assemble, "write_shards", slip_in)
    with pytest.raises(CheckpointError, match="changed while it was converted"):
        convert(source, target)
    assert list(target.parent.iterdir()) == []


def test_a_source_that_shrinks_meanwhile_is_named(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_shards = assemble.plan_shards
    shard = source / "model-00002-of-00002.safetensors"

    def slip_in(*args: object, **kwargs: object) -> object:
        os.truncate(shard, 4000)
        return plan_shards(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(assemble, "plan_shards", slip_in)
    with pytest.raises(OSError, match=f"`{shard}` ends at byte 4000, and .* more were expected"):
        convert(source, target)
    assert list(target.parent.iterdir()) == []


def test_what_does_not_read_back_is_refused(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = scan.SourceFile.read_into

    def flip(self: object, offset: int, buffer: Buffer, position: int, nbytes: int) -> None:
        read(self, offset, buffer, position, nbytes)  # type: ignore[arg-type]
        buffer.view[position + nbytes - 1] ^= 4

    write_shards = assemble.write_shards

    def then_flip(*args: object, **kwargs: object) -> None:
        write_shards(*args, **kwargs)  # type: ignore[arg-type]
        monkeypatch.setattr(scan.SourceFile, "read_into", flip)

    monkeypatch.setattr(assemble, "write_shards", then_flip)
    with pytest.raises(ChecksumMismatch, match="does not read back as it was written between byte"):
        convert(source, target)
    assert list(target.parent.iterdir()) == []


def test_the_read_back_can_be_left_out(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "read_back", None)
    result = convert(source, target, verify=False)
    assert result.verify_s < result.write_s
    assert_same_tensors(target, TENSORS)


def test_progress_counts_every_byte_up(tmp_path: Path, target: Path) -> None:
    source = write_checkpoint(tmp_path / "s", {"model.safetensors": {"a": torch.ones(12 * 2**20)}})
    calls: list[tuple[str, int, int]] = []
    convert(source, target, progress=lambda *call: calls.append(call))
    assert [stage for stage, _, _ in calls] == sorted(stage for stage, _, _ in calls)
    size = (target / "model.safetensors").stat().st_size
    for stage in ("convert", "verify"):
        done = [done for name, done, _ in calls if name == stage]
        assert done == sorted(done)
        assert done[-1] == size
        assert {total for name, _, total in calls if name == stage} == {size}


def test_ctrl_c_leaves_nothing(source: Path, target: Path) -> None:
    for stage in ("convert", "verify"):

        def interrupt(now: str, done: int, total: int, stage: str = stage) -> None:
            if now == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source, target, progress=interrupt)
        assert list(target.parent.iterdir()) == []


def test_ctrl_c_under_force_leaves_the_old_checkpoint(source: Path, target: Path) -> None:
    convert(source, target)
    before = files_of(target)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, max_shard_bytes=8000, force=True, progress=interrupt)
    assert files_of(target) == before
    assert only_child(target.parent) == target


def test_no_torch_is_imported_to_convert(source: Path, target: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sllmctl.core.write.convert import convert\n"
        "from sllmctl.core.verify import verify\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2])); assert verify(Path(sys.argv[2])).ok\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, source, target], check=True)


def test_files_are_written_once_and_synced_before_the_manifest(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        events.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    convert(source, target, max_shard_bytes=8000)
    manifest = events.index("sllmctl.json")
    shards = [name for name in events if name.startswith("model-")]
    assert len(shards) == len(set(shards)) == len(open_checkpoint(target).shards)
    assert all(events.index(name) < manifest for name in (*shards, "config.json"))
    assert events[manifest + 1 :][-1] == target.parent.name
