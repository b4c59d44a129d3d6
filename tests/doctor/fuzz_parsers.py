"""Random and mutated text for every parser of outside text: nothing may raise.

`python -m tests.doctor.fuzz_parsers --inputs 1000000` is the long form.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from sllmctl.doctor.cann_files import key_values, root_of
from sllmctl.doctor.elf import parse_elf
from sllmctl.doctor.host import Host
from sllmctl.doctor.log_signatures import read_log
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.npu_smi import generation, parse_npu_smi
from sllmctl.doctor.proxies import grpc_proxied, http_proxied
from sllmctl.doctor.redact import Redactor
from sllmctl.doctor.tables import driver_verdict, load_tables
from sllmctl.doctor.tree_probe import TreeProbe
from sllmctl.doctor.versions import cann_base, cann_key, dotted_in, driver_key, public, release
from tests.doctor.elf_file import shared_library
from tests.doctor.smi_output import cards, render
from tests.doctor.tree import Tree, good

TABLES = load_tables()
REDACT = Redactor(Host(user="alice", name="npu-host", home="/home/alice"))
ELF = shared_library("x86_64", ["libc.so.6"], ["GLIBCXX_3.4.30"], "$ORIGIN")
TEXTS = [
    render("25.2.0", cards(2)),
    "dcmi module initialize failed. ret is -8005\n",
    "Version=25.0.rc1.1\ncompatible_version_fw=[7.0.0,7.7.99]\n",
    "toolkit_running_version=[7.6.0.1.220:8.0.0],[7.7:8.1.RC1]\n",
    "8.1.RC1", "9.0.0.b250", "24.1.rc3.7", "2.6.0.post3+cpu", "[23.0.0,24.1.]",
    "/usr/local/Ascend/ascend-toolkit/latest/lib64:/usr/local/Ascend/cann-8.5.0/opp",
    "OSError: libatb.so: cannot open shared object file\n[ERROR] 2025 (PID:1) ERR99999 UNKNOWN\n",
    "http://user:pass@proxy:3128 hf_abcdefghijkl 10.0.0.1 fe80::1 /home/alice",
    "localhost, 127.0.0.0/8,*,.local",
]  # fmt: skip


def _elf(data: bytes) -> object:
    return parse_elf(lambda at, size: data[at : at + size])


def _log(text: str) -> object:
    return read_log(text.splitlines(), TABLES)


def _versions(text: str) -> object:
    parts = text.split(",")
    row = TABLES.driver[-1]
    return (
        cann_base(text), cann_key(text), driver_key(text), public(text), release(text),
        dotted_in(parts[0], parts[-1], parts[len(parts) // 2]), driver_verdict(row, text),
    )  # fmt: skip


def _proxies(text: str) -> object:
    env = {"http_proxy": "http://p:1", "no_proxy": text}
    return [grpc_proxied(env, "127.0.0.1", new=new) for new in (False, True)] + [
        http_proxied(env, "127.0.0.1")
    ]


PARSERS: list[Callable[[str], object]] = [
    parse_npu_smi, generation, key_values, root_of, _versions, _log, _proxies, REDACT,
]  # fmt: skip


def mutate(random_: random.Random, data: bytes) -> bytes:
    """A few bytes changed, removed, doubled or put in."""
    raw = bytearray(data)
    for _ in range(random_.randint(1, 8)):
        at = random_.randrange(len(raw) + 1)
        kind = random_.randrange(4)
        if kind == 0:
            raw[at : at + 1] = bytes([random_.randrange(256)])
        elif kind == 1:
            del raw[at : at + random_.randint(1, 16)]
        elif kind == 2:
            raw[at:at] = raw[at : at + random_.randint(1, 16)]
        else:
            raw[at:at] = random_.choice(
                [b"|", b"/", b"9" * 30, b"\0", b"\xff\xfe", b":", b"[", b"\n"]
            )
    return bytes(raw)


def run(inputs: int, seed: int = 0) -> None:
    """Put so many inputs through the parsers, one parser each; raises what one of them raises."""
    random_ = random.Random(seed)
    for i in range(inputs):
        if i % 8 == 7:
            _elf(mutate(random_, ELF))
            continue
        if random_.random() < 0.1:
            raw = random_.randbytes(random_.randrange(200))
        else:
            raw = mutate(random_, random_.choice(TEXTS).encode())
        random_.choice(PARSERS)(raw.decode("utf-8", "replace"))


def run_trees(trees: int, seed: int = 0) -> None:
    """Whole machines with damaged files: every check ends, none breaks."""
    from sllmctl.doctor.check import Status
    from sllmctl.doctor.examine import examine

    random_ = random.Random(seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        tree = good(Tree(Path(directory)))
        tree.write()
        files = sorted(
            p for p in Path(directory).rglob("*") if p.is_file() and p.name != "machine.json"
        )
        for _ in range(trees):
            hurt = random_.sample(files, 6)
            kept = {path: path.read_bytes() for path in hurt}
            for path, raw in kept.items():
                path.write_bytes(mutate(random_, raw) if raw else random_.randbytes(64))
            done = examine(Machine(TreeProbe(Path(directory)), tables=TABLES))
            broken = [f"{o.check.id}: {o.finding.summary}" for o in done.of(Status.ERROR)]
            assert not broken, broken
            for path, raw in kept.items():
                path.write_bytes(raw)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--trees", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run(arguments.inputs, arguments.seed)
    run_trees(arguments.trees, arguments.seed)
    print(f"{arguments.inputs} inputs, {arguments.trees} damaged machines: nothing raised")
