"""`docs/reference/format.md` is enough to read a checkpoint and to recompute its digests.

The reader below follows that page alone: nothing of sllmctl is used but to make checkpoints.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from sllmctl.core.manifest import Origin
from sllmctl.core.write.convert import convert
from tests.conftest import same_bits, some_tensors, write_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "format.md"
UNUSUAL_BITS = {"float4_e2m1fn_x2": 4, "none": 6}  # two in a byte; no dtype at all


def example(name: str) -> str:
    """The table or code block that follows a marker in the page."""
    text = PAGE.read_text().split(f"<!-- example: {name} -->\n", 1)[1]
    fenced = re.match(r"```json\n(.*?)```", text, re.DOTALL)
    return fenced[1] if fenced else text.split("\n\n", 1)[0]


def dtype_bits() -> dict[str, tuple[int, str]]:
    """The table of element types: code to bits and torch's name."""
    section = PAGE.read_text().split("### Element types", 1)[1].split("###", 1)[0]
    rows = re.findall(r"`(\w+)` \| (\d+) \| `?(\w+)`?", section)
    return {code: (int(bits), name) for code, bits, name in rows}


# ---- a reader, from the text -------------------------------------------------------------------


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a shard, and where its data section starts."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length].decode()), 8 + length


def read_shards(directory: Path) -> list[Path]:
    """The files that make up a checkpoint, by the four rules."""
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    indexes = [index] if index.exists() else list(directory.glob("*.safetensors.index.json"))
    if indexes:
        names = json.loads(indexes[0].read_bytes())["weight_map"].values()
        return [directory / name for name in sorted(set(names))]
    return sorted(directory.glob("*.safetensors"))


def read_tensors(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor, aliases included: dtype, shape, bytes."""
    sizes = dtype_bits()
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    claims: dict[str, str] = {}
    for path in read_shards(directory):
        raw = path.read_bytes()
        header, start = read_header(path)
        metadata = header.pop("__metadata__", {})
        position = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            assert begin == position
            assert 8 * (end - begin) == sizes[entry["dtype"]][0] * math.prod(entry["shape"])
            assert name not in tensors
            tensors[name] = entry["dtype"], entry["shape"], raw[start + begin : start + end]
            position = end
        assert start + position == len(raw)
        claims |= {k: v for k, v in metadata.items() if k != "format" and v in header}
    for alias, stored in claims.items():
        if alias not in tensors:
            tensors[alias] = tensors[stored]
    return tensors


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def check_manifest(text: str) -> dict[str, Any]:
    """Parse a manifest after comparing it with its own digest."""
    document: dict[str, Any] = json.loads(text)
    expected = document.pop("manifest_digest")
    canonical = json.dumps(document, separators=(",", ":"), sort_keys=True)
    assert digest(canonical.encode()) == expected
    return document


def shard_record(path: Path, chunk_bytes: int) -> dict[str, Any]:
    """What the manifest must say of a shard."""
    raw = path.read_bytes()
    chunks = [digest(raw[at : at + chunk_bytes]) for at in range(0, len(raw), chunk_bytes)]
    joined = "".join(chunks)
    return {
        "name": path.name,
        "size": len(raw),
        "digest": digest(bytes.fromhex(joined)),
        "chunks": joined,
    }


def check_digests(directory: Path) -> dict[str, Any]:
    """Recompute every digest of a checkpoint from its files."""
    document = check_manifest((directory / "sllmctl.json").read_text())
    shards = [shard_record(path, document["chunk_bytes"]) for path in read_shards(directory)]
    assert document["shards"] == shards
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
    others = names - {"sllmctl.json"} - {shard["name"] for shard in shards}
    files = {name: directory / name for name in others if (directory / name).is_file()}
    assert document["files"] == [
        {"name": name, "size": path.stat().st_size, "digest": digest(path.read_bytes())}
        for name, path in sorted(files.items())
    ]
    return document


# ---- the page against checkpoints that sllmctl writes ------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [2**34, 20_000])
def test_a_reader_written_from_the_page_reads_a_converted_checkpoint(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    tensors = {**some_tensors(0, scale=4), **some_tensors(11), **some_tensors(2)}
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors})
    (source / "config.json").write_text("{}")
    (source / "original").mkdir()
    (source / "extra").mkdir()
    (source / "extra" / "notes ü.txt").write_text("kept")
    target = convert(source, tmp_path / "target", max_shard_bytes=max_shard_bytes).path
    names = {code: name for code, (_, name) in dtype_bits().items()}
    read = read_tensors(target)
    assert read.keys() == tensors.keys()
    for name, (code, shape, data) in read.items():
        dtype = getattr(torch, names[code])
        value = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0).to(dtype)
        assert same_bits(value.reshape(shape), tensors[name]), name
    document = check_digests(target)
    assert document["tensors"] == len(tensors)
    assert document["bytes"] == sum(len(data) for _, _, data in read.values())
    assert (len(document["shards"]) > 1) == (max_shard_bytes == 20_000)
    for path in read_shards(target):
        assert read_header(path)[1] % 4096 == 0
        load_file(path)


def test_digests_of_several_chunks_follow_the_page(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(5 * 2**20 + 3, dtype=torch.int32)}
    source = write_checkpoint(tmp_path / "source", {"model.safetensors": tensors})
    target = convert(source, tmp_path / "target", verify=False).path
    (shard,) = check_digests(target)["shards"]
    assert len(shard["chunks"]) == 2 * 32


def test_element_types_of_the_page_are_those_of_the_code() -> None:
    from sllmctl.core.dtypes import DTYPE_BITS

    table = dtype_bits()
    assert {code: bits for code, (bits, _) in table.items()} == DTYPE_BITS
    for bits, name in table.values():
        assert bits == (UNUSUAL_BITS.get(name) or 8 * getattr(torch, name).itemsize)


# ---- the worked example ------------------------------------------------------------------------


def example_shard() -> bytes:
    """The example's file, made of nothing but what the page says."""
    text = example("header").replace("\n", "").encode()
    header = text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8)
    size = max(
        entry["data_offsets"][1] for name, entry in json.loads(text).items() if name[0] != "_"
    )
    return struct.pack("<Q", len(header)) + header + bytes(k % 251 for k in range(size))


def write_example_source(directory: Path) -> Path:
    """The example before conversion: the same tensors in the order of their names, no padding."""
    shard = example_shard()
    header = json.loads(example("header"))
    document = {"__metadata__": header.pop("__metadata__")}
    data = b""
    for name, entry in sorted(header.items()):
        begin, end = entry["data_offsets"]
        place = [len(data), len(data) + end - begin]
        document[name] = entry | {"data_offsets": place}
        data += shard[4096 + begin : 4096 + end]
    text = json.dumps(document, separators=(",", ":")).encode()
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (directory / "config.json").write_bytes(b'{"model_type": "tiny"}\n')
    return directory


def convert_example(tmp_path: Path) -> Path:
    source = write_example_source(tmp_path / "source")
    origin = Origin(
        hub="huggingface", name="example/tiny", revision="0123456789abcdef" * 2 + "01234567"
    )
    return convert(source, tmp_path / "target", origin=origin).path


def test_the_example_shard_is_what_conversion_writes(tmp_path: Path) -> None:
    assert (convert_example(tmp_path) / "model.safetensors").read_bytes() == example_shard()


def test_the_example_table_agrees_with_the_example_header() -> None:
    header = json.loads(example("header"))
    del header["__metadata__"]
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in example("layout").splitlines()
    ]
    table = [
        (name.strip("`"), dtype, [int(n) for n in shape.split(",") if n], *map(int, numbers))
        for name, dtype, shape, *numbers in rows[2:]
    ]
    assert table == [
        (
            name,
            e["dtype"],
            e["shape"],
            end - begin,
            math.gcd(end - begin, 4096),
            begin,
            begin + 4096,
        )
        for name, e in header.items()
        for begin, end in [e["data_offsets"]]
    ]


def test_the_numbers_about_the_example_hold() -> None:
    text = " ".join(PAGE.read_text().split())
    shard = example_shard()
    (length,) = struct.unpack_from("<Q", shard)
    json_bytes = len(shard[8 : 8 + length].rstrip(b" "))
    assert (
        f"is {json_bytes} bytes of JSON and {length - json_bytes} spaces: `H` is {length}" in text
    )
    assert f"starts with `{shard[:8].hex(' ')}`" in text
    assert f"4096 + {len(shard) - 4096} = {len(shard)} bytes" in text


def test_the_example_manifest_follows_from_the_example_shard(tmp_path: Path) -> None:
    document = check_manifest(example("manifest"))
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(example_shard())
    assert document["shards"] == [shard_record(shard, document["chunk_bytes"])]
    config = b'{"model_type": "tiny"}\n'
    assert document["files"] == [
        {"name": "config.json", "size": len(config), "digest": digest(config)}
    ]


def test_the_example_manifest_is_what_conversion_writes(tmp_path: Path) -> None:
    written = json.loads((convert_example(tmp_path) / "sllmctl.json").read_text())
    shown = json.loads(example("manifest"))
    assert list(written) == list(shown)
    for document in (written, shown):
        del document["tool"], document["manifest_digest"]
    assert written == shown


def test_the_fields_of_the_page_are_those_of_the_manifest() -> None:
    section = PAGE.read_text().split("| field | type | meaning |", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"^\| `(\w+)`", section, re.MULTILINE) == list(
        json.loads(example("manifest"))
    )


def test_a_walk_over_a_storage_path_passes_over_what_is_being_made(tmp_path: Path) -> None:
    from sllmctl.core.config import find_models
    from sllmctl.core.write.target import Target

    done = convert_example(tmp_path)
    target = tmp_path / "org" / "model"
    shutil.copytree(done, target)
    with Target(target, fingerprint="0", force=True) as making:
        assert making.directory.name == ".model.partial"
        names = {path.name for path in target.parent.iterdir()}
        assert names == {"model", ".model.partial", ".model.partial.lock"}
        shutil.copy(done / "model.safetensors", making.directory)
        assert [name for name, _ in find_models(tmp_path / "org")] == ["model"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]
