"""What the reader refuses, and how it says so. Safetensors' own reader is asked as well."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.errors import CheckpointError, CheckpointNotFound
from tests.raw import entry, write_raw

U8 = entry("U8", [4], 0, 4)
DUPLICATE = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' + (
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
)

REFUSED: dict[str, tuple[Any, bytes, str]] = {
    "an unknown dtype": (
        {"a": entry("C128", [1], 0, 16)},
        bytes(16),
        "tensor `a` of `.*` has the unknown dtype `C128`",
    ),
    "a dtype that is no text": ({"a": entry(7, [1], 0, 1)}, b"\0", "unknown dtype `7`"),  # type: ignore[arg-type]
    "a data section that is too short": (
        {"a": U8},
        b"\0\0",
        r"tensor `a` .* takes bytes `0` to `4` of the data, but the file holds 2",
    ),
    "bytes after the last tensor": (
        {"a": U8},
        bytes(9),
        "has 5 bytes after its last tensor: tensors end at 4 of 9",
    ),
    "bytes without any tensor": ({}, bytes(3), "has 3 bytes after its last tensor"),
    "a hole between tensors": (
        {"a": U8, "b": entry("U8", [4], 6, 10)},
        bytes(10),
        "tensor `b` .* leaves a hole: it takes bytes 6 to 10 of the data, 4 is next",
    ),
    "a hole before the first tensor": ({"a": entry("U8", [4], 2, 6)}, bytes(6), "leaves a hole"),
    "two tensors in one place": (
        {"a": U8, "b": U8},
        bytes(4),
        "tensor `b` .* overlaps the tensor before it: it takes bytes 0 to 4 of the data, 4 is",
    ),
    "tensors that overlap in part": (
        {"a": U8, "b": entry("U8", [4], 2, 6)},
        bytes(6),
        "tensor `b` .* overlaps",
    ),
    "an empty tensor inside another": (
        {"a": U8, "z": entry("U8", [0], 2, 2)},
        bytes(4),
        "tensor `z` .* overlaps",
    ),
    "more bytes than the shape needs": (
        {"a": entry("F32", [1], 0, 8)},
        bytes(8),
        r"takes bytes `0` to `8` of the data, 8 bytes; F32 `\[1\]` needs 4",
    ),
    "an end before the begin": ({"a": entry("U8", [4], 4, 0)}, bytes(4), "impossible offsets"),
    "a negative begin": ({"a": entry("U8", [4], -4, 0)}, bytes(4), "impossible offsets"),
    "an offset that is a fraction": (
        {"a": entry("U8", [1], 0, 1.0)},
        b"\0",
        "not two integers",
    ),
    "an offset that is true": ({"a": entry("U8", [1], False, True)}, b"\0", "not two integers"),
    "three offsets": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}},
        b"\0",
        "not two integers",
    ),
    "an offset beyond 64 bits": (
        {"a": entry("U8", [1], 0, 10**4000)},
        b"\0",
        "but the file holds 1",
    ),
    "a number of 5,000 digits": (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        b"\0",
        "not valid JSON: Exceeds the limit",
    ),
    "a negative axis": ({"a": entry("U8", [-1], 0, 1)}, b"\0", r"impossible shape `\[-1\]`"),
    "an axis that is a fraction": ({"a": entry("U8", [1.0], 0, 1)}, b"\0", "not a list of int"),
    "an axis that is true": ({"a": entry("U8", [True], 0, 1)}, b"\0", "not a list of integers"),
    "a shape that is a number": (
        {"a": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}},
        b"\0",
        "has the shape `1`, not a list",
    ),
    "a shape whose product is beyond 64 bits": (
        {"a": entry("U8", [2**62, 2**62], 0, 4)},
        bytes(4),
        "needs 2126764793",
    ),
    "an axis beyond 64 bits": ({"a": entry("U8", [2**63], 0, 4)}, bytes(4), "impossible shape"),
    "huge axes hidden behind a zero": (
        {"a": entry("U8", [2**62, 2**62, 0], 0, 0)},
        b"",
        "impossible shape",
    ),
    "half a byte of four-bit elements": (
        {"a": entry("F4", [3], 0, 2)},
        bytes(2),
        r"tensor `a` .* of F4 has the impossible shape `\[3\]`",
    ),
    "half a byte of six-bit elements": (
        {"a": entry("F6_E2M3", [3], 0, 2)},
        bytes(2),
        "impossible shape",
    ),
    "an entry without a shape": (
        {"a": {"dtype": "U8", "data_offsets": [0, 1]}},
        b"\0",
        "tensor `a` .* has no `shape`",
    ),
    "an entry that is a list": ({"a": [1]}, b"", "is not described by a JSON object"),
    "an entry that is null": ({"a": None}, b"", "is not described by a JSON object"),
    "a header that is a list": (b"[]", b"", "is not a JSON object"),
    "a header that is no JSON": (b"{", b"", "is not valid JSON"),
    "an empty header": (b"", b"", "is not valid JSON"),
    "a header that is not UTF-8": (b'{"\xff":1}', b"", "is not valid JSON: .*utf-8"),
    "a header in UTF-16": ('{"a":1}'.encode("utf-16"), b"", "is not valid JSON"),
    "something behind the object": (b"{} x", b"", "is not valid JSON: Extra data"),
    "a NUL behind the object": (b"{}\0\0", b"", "is not valid JSON: Extra data"),
    "half of a surrogate pair": (
        b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        "surrogates not allowed",
    ),
    "a control character in a name": (
        b'{"a\nb":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        "Invalid control character",
    ),
    "the key dtype twice": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        "duplicate key 'dtype'",
    ),
    "metadata twice": (
        b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"b"}}',
        b"",
        "duplicate key '__metadata__'",
    ),
    "metadata that are numbers": ({"__metadata__": {"a": 1}}, b"", "not an object of texts"),
    "metadata that are a list": ({"__metadata__": []}, b"", "not an object of texts"),
    "brackets 100,000 deep": (b'{"a":' + b"[" * 100_000, b"", "is not valid JSON"),
    "objects 100,000 deep": (b'{"a":' * 100_000, b"", "is not valid JSON"),
}

STRICTER: dict[str, tuple[Any, bytes, str]] = {
    "one name twice": (DUPLICATE, b"\0", "duplicate key 'a'"),
    "a metadata key twice": (b'{"__metadata__":{"a":"b","a":"c"}}', b"", "duplicate key 'a'"),
    "a hundred axes": ({"a": entry("U8", [1] * 100, 0, 1)}, b"\0", "impossible shape"),
}
"""Accepted by safetensors, which takes the last of two; ambiguous, and so refused here."""


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_in_one_line(what: str, tmp_path: Path) -> None:
    header, data, message = REFUSED[what]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


@pytest.mark.parametrize("what", STRICTER)
def test_refuses_what_safetensors_reads_one_way_or_another(what: str, tmp_path: Path) -> None:
    header, data, message = STRICTER[what]
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is 0 bytes long, too short"),
        (bytes(7), "is 7 bytes long, too short"),
        ((3).to_bytes(8, "little") + b"{}", "announces a header of 3 bytes but is 10 bytes long"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer to a file, not the file"),
        ((10**8 + 1).to_bytes(8, "little"), "a header of 100000001 bytes; the limit is 100000000"),
        (b"\xff" * 8, "a header of 18446744073709551615 bytes; the limit"),
    ],
)
def test_refuses_a_bad_length_before_reading(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_refuses_a_megabyte_of_brackets_without_parsing_it(tmp_path: Path) -> None:
    text = b'{"a":[' + b"[]," * 500_000 + b"[]]}"
    write_raw(tmp_path / "model.safetensors", text)
    with pytest.raises(CheckpointError, match="nests too many containers"):
        open_checkpoint(tmp_path)


def test_names_in_messages_are_printable_and_short(tmp_path: Path) -> None:
    name = "\x1b[31m\n" + "x" * 5000
    write_raw(tmp_path / "model.safetensors", {name: entry("U8", [1], 0, 2)}, bytes(2))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()
    assert r"\x1b[31m\n" in str(caught.value)
    assert len(str(caught.value)) < 1000


def sharded(directory: Path, weight_map: Any) -> Path:
    write_raw(directory / "one.safetensors", {"a": entry("U8", [1], 0, 1)}, b"a")
    write_raw(directory / "two.safetensors", {"b": entry("U8", [1], 0, 1)}, b"b")
    index = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


GOOD_MAP = {"a": "one.safetensors", "b": "two.safetensors"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({**GOOD_MAP, "c": "two.safetensors"}, "tensor `c` is in `two.safetensors`, but no shard"),
        ({**GOOD_MAP, "b": "one.safetensors"}, "tensor `b` is in `one.safetensors`, but no shard"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "`a` .*but `one.safetensors` has it"),
        ({**GOOD_MAP, "c": "three.safetensors"}, "shard `.*three.safetensors` is missing"),
        ({"a": "/etc/passwd"}, "names the shard `/etc/passwd`"),
        ({"a": "../x.safetensors"}, r"names the shard `\.\./x.safetensors`"),
        ({"a": "x/../../y"}, "which is not a file beneath its directory"),
        ({"a": ""}, "names the shard ``"),
        ({"a": "."}, r"names the shard `\.`"),
        ({"a": "a\0b"}, "which is not a file beneath"),
        ({"a": 5}, "maps tensor `a` to no file name"),
        ({"a": None}, "maps tensor `a` to no file name"),
        ({}, "maps no tensor to a file"),
        ([], "has no object `weight_map`"),
        (None, "has no object `weight_map`"),
    ],
)
def test_refuses_an_index_that_misleads(weight_map: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded(tmp_path, weight_map))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}', "duplicate key 'a'"),
        (b"[" * 200_000, "is not valid JSON"),
    ],
)
def test_refuses_a_damaged_index(text: bytes, message: str, tmp_path: Path) -> None:
    sharded(tmp_path, GOOD_MAP)
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_refuses_one_name_in_two_shards(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        write_raw(tmp_path / name, {"a": entry("U8", [1], 0, 1)}, b"a")
    with pytest.raises(CheckpointError, match="`a` is in two shards .*`one.* and `two"):
        open_checkpoint(tmp_path)


def test_refuses_several_indexes_of_unusual_names(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has 2 indexes"):
        open_checkpoint(tmp_path)


def test_says_that_nothing_is_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointNotFound, match="no checkpoint"):
            open_checkpoint(path)
    other = tmp_path / "weights.bin"
    other.write_bytes(b"x")
    with pytest.raises(CheckpointNotFound, match="is not a safetensors file"):
        open_checkpoint(other)


def test_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "sllmctl.json"])
def test_a_description_that_would_block_or_never_end_is_refused(name: str, tmp_path: Path) -> None:
    path = sharded(tmp_path, GOOD_MAP) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path)
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(CheckpointError, match="the limit is 100000000"):
        open_checkpoint(tmp_path)


def test_refuses_a_part_of_what_the_names_count(tmp_path: Path) -> None:
    for number in (1, 3):
        header = {f"t{number}": entry("U8", [1], 0, 1)}
        write_raw(tmp_path / f"model-0000{number}-of-00003.safetensors", header, b"a")
    with pytest.raises(CheckpointError, match="`model-00002-of-00003.safetensors` is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_says_that_a_file_may_not_be_read(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {}).chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint(tmp_path)


def test_a_dangling_link_is_a_missing_shard(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(tmp_path)
