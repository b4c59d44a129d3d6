"""Machines with damaged files: every check ends, none breaks.

`python -m tests.doctor.fuzz_machines --machines 3000` is the long form. The parsers alone are
fuzzed by `tests.fuzz`, as the target `doctor`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from sllmctl.doctor.check import Status
from sllmctl.doctor.examine import examine
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.tables import load_tables
from sllmctl.doctor.tree_probe import TreeProbe
from tests.doctor.scenario import MEMORY
from tests.doctor.tree import Tree, good

TABLES = load_tables()


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


def run(machines: int, seed: int = 0) -> None:
    """Damage six files of a healthy machine, so many times; raises where a check breaks."""
    random_ = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        tree = good(Tree(Path(directory)))
        tree.write()
        files = sorted(
            p for p in Path(directory).rglob("*") if p.is_file() and p.name != "machine.json"
        )
        for _ in range(machines):
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
    parser.add_argument("--machines", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run(arguments.machines, arguments.seed)
    print(f"{arguments.machines} damaged machines: no check broke")
