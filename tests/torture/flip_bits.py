"""Flip random bits of a converted checkpoint, one at a time, and see that `verify` finds each.

`python -m tests.torture.flip_bits --count 1000` makes a small checkpoint and reports.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from sllmctl.core.manifest import MANIFEST_NAME
from sllmctl.core.verify import verify


def flip_bits(checkpoint: Path, *, count: int, seed: int) -> list[str]:
    """Flip bits of weights, index and manifest, one at a time; return those that went unnoticed."""
    files = [*sorted(checkpoint.glob("*.safetensors*")), checkpoint / MANIFEST_NAME]
    sizes = [path.stat().st_size for path in files]
    generator = random.Random(seed)
    missed = []
    for _ in range(count):
        # Half of the flips by size, half by file: small files get their share.
        path = generator.choice(files) if generator.random() < 0.5 else _by_size(generator, files)
        offset = generator.randrange(sizes[files.index(path)])
        mask = 1 << generator.randrange(8)
        _flip(path, offset, mask)
        problems = verify(checkpoint).problems
        if not any(problem.file in (path.name, "") for problem in problems):
            missed.append(f"{path.name} at byte {offset}, bit mask {mask}")
        _flip(path, offset, mask)
    if not verify(checkpoint).ok:
        missed.append("the checkpoint is not whole after all flips were undone")
    return missed


def _by_size(generator: random.Random, files: list[Path]) -> Path:
    return generator.choices(files, [path.stat().st_size for path in files])[0]


def _flip(path: Path, offset: int, mask: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ mask]), offset)
    finally:
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import torch

    from sllmctl.core.write.save import save_tensors

    with TemporaryDirectory() as directory:
        generator = torch.Generator().manual_seed(arguments.seed)
        tensors = {
            f"layers.{n}.weight": torch.randn(999 + n, 1000, generator=generator) for n in range(8)
        }
        checkpoint = Path(directory) / "model"
        save_tensors(tensors, checkpoint, max_shard_bytes=12_000_000)
        missed = flip_bits(checkpoint, count=arguments.count, seed=arguments.seed)
    for place in missed:
        print(f"not found: {place}")
    print(f"{arguments.count - len(missed)} of {arguments.count} flipped bits found")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
