"""A client without torch: load a model through the store again and again, and compare every byte.

`python -m tests.torture.store_client SOCKET MODEL...`: a line for each load, `ok` or what is wrong.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import xxhash

from sllmctl.errors import StoreError
from sllmctl.native import PAGE_BYTES, Memory
from sllmctl.store.client import StoreClient

UNIT_BYTES = 2 * 2**20
"""The segments of the stores that these clients use."""


def shards_of(model: Path) -> list[Path]:
    """The model's files, in order."""
    return sorted(model.glob("*.safetensors"))


def digest_of_files(model: Path) -> str:
    """What the bytes must be."""
    hasher = xxhash.xxh3_128()
    for shard in shards_of(model):
        hasher.update(shard.read_bytes())
    return hasher.hexdigest()


def digest_through_store(socket: Path, model: Path) -> tuple[str, int, int]:
    """Attach, map what the store has, read the rest.

    Returns:
        The digest, bytes from the store, and bytes from disk.
    """
    shards = shards_of(model)
    fds = [os.open(shard, os.O_RDONLY) for shard in shards]
    sizes = [shard.stat().st_size for shard in shards]
    memories = [Memory.create(size) for size in sizes]
    unit = UNIT_BYTES
    missing = {(n, i) for n, size in enumerate(sizes) for i in range(-(-size // unit))}
    mapped = 0
    try:
        with StoreClient(socket) as client:
            client.send_shards([shard.name for shard in shards], fds)
            client.send({"op": "attach", "label": model.name})
            client.receive()
            assert client.segment_bytes == unit
            while True:
                message, parts = client.receive()
                if message["event"] == "settled":
                    break
                for (shard, index), fd in zip(message["pieces"], parts, strict=True):
                    nbytes = min(unit, sizes[shard] - index * unit)
                    memories[shard].place(index * unit, fd, -(-nbytes // PAGE_BYTES) * PAGE_BYTES)
                    os.close(fd)
                    missing.discard((shard, index))
                    mapped += nbytes
            digest, read = _digest(memories, sizes, fds, missing, unit)
    except StoreError:
        digest, read = _digest(memories, sizes, fds, missing, unit)
    finally:
        for fd in fds:
            os.close(fd)
    return digest, mapped, read


def _digest(
    memories: list[Memory],
    sizes: list[int],
    fds: list[int],
    missing: set[tuple[int, int]],
    unit: int,
) -> tuple[str, int]:
    read = 0
    for shard, index in missing:
        nbytes = min(unit, sizes[shard] - index * unit)
        part = os.pread(fds[shard], nbytes, index * unit)
        memoryview(memories[shard].buffer)[index * unit : index * unit + nbytes] = part
        read += nbytes
    hasher = xxhash.xxh3_128()
    for memory in memories:
        hasher.update(memory.buffer)
    return hasher.hexdigest(), read


def main() -> None:
    """Load at random until killed, or as often as ``SLLM_LOADS`` says."""
    socket, *models = map(Path, sys.argv[1:])
    wanted = {model: digest_of_files(model) for model in models}
    generator = random.Random(os.getpid())
    for _ in range(int(os.environ.get("SLLM_LOADS", "1000000"))):
        model = generator.choice(models)
        digest, mapped, read = digest_through_store(socket, model)
        verdict = "ok" if digest == wanted[model] else f"WRONG {model}"
        print(verdict, mapped, read, flush=True)


if __name__ == "__main__":
    main()
