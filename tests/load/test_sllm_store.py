"""Loading what sllm-store wrote: every byte right, and its known damage told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sllmctl import api, load_tensors, stream_tensors
from sllmctl.core import sllm_store
from sllmctl.core import stream as stream_module
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.load import LoadOptions, load
from sllmctl.errors import CheckpointError, CheckpointNotFound
from tests.conftest import same_bits, some_tensors
from tests.sllm_store import golden_tensors, write_sllm_store

GOLDEN = Path(__file__).parents[1] / "data" / "sllm_store_080"
MAP = LoadOptions()
COPY = LoadOptions(map_files="never")


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    """Every element type, tied names, views of each other, strides, records larger than tensors."""
    tensors = some_tensors(0) | some_tensors(1, scale=40)
    tensors["int16"] = torch.arange(7, dtype=torch.int16)
    tensors["int32"] = torch.arange(9, dtype=torch.int32)
    tensors["tied"] = tensors["layers.1.weight"]
    base = torch.randn(6, 4)
    tensors |= {"base": base, "transposed": base.t(), "part": base[:3], "step": base[::2, ::3]}
    tensors["wide"] = torch.arange(5).expand(3, 5)
    tensors["last"] = torch.randn(2, 3, 5).permute(2, 0, 1)
    return tensors


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert not [name for name in want if not same_bits(got[name], want[name])]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory of several data files."""
    directory = write_sllm_store(tmp_path / "m", tensors_of_all_kinds(), partition_bytes=40_000)
    assert len(list(directory.glob("tensor.data_*"))) > 2
    return directory


@pytest.mark.parametrize("options", [MAP, COPY], ids=["mapped", "copied"])
def test_every_dtype_stride_and_tie_comes_back_bit_for_bit(
    saved: Path, options: LoadOptions
) -> None:
    torch.manual_seed(0)
    write_sllm_store(saved, want := tensors_of_all_kinds(), partition_bytes=40_000)
    loaded = api.load(saved, store="off", options=options)
    assert_equal(loaded.tensors, want)
    assert loaded.tensors["tied"] is loaded.tensors["layers.1.weight"]
    assert loaded.tensors["transposed"].stride() == want["transposed"].stride()
    stats = loaded.stats
    assert stats.disk_bytes + stats.page_cache_bytes == stats.bytes


def test_what_the_original_writer_wrote_is_read_for_ever() -> None:
    loaded = api.load(GOLDEN, store="off")
    assert_equal(loaded.tensors, golden_tensors())
    assert loaded.tensors["head"] is loaded.tensors["embed"]


def test_the_fixture_is_what_the_original_writer_writes(tmp_path: Path) -> None:
    write_sllm_store(tmp_path, golden_tensors(), padding=b"\0")
    for path in GOLDEN.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_stream_yields_the_same_in_any_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = tensors_of_all_kinds()
    write_sllm_store(tmp_path, want, partition_bytes=40_000)
    for window_bytes in (1, 1000, 10**9):
        stream = stream_module.stream(open_checkpoint(tmp_path), COPY, window_bytes=window_bytes)
        assert_equal(dict(stream), want)
    assert_equal(dict(stream_tensors(tmp_path)), want)


def test_of_views_of_one_record_the_longest_is_streamed_whole(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    want = {"base": base, "part": base[:3], "element": base[0, 0]}
    write_sllm_store(tmp_path, want)
    assert_equal(dict(stream_module.stream(open_checkpoint(tmp_path), COPY)), want)


def test_padding_and_files_that_an_older_save_left_are_no_tensors(saved: Path) -> None:
    want = load_tensors(saved, store="off")
    files = sorted(saved.glob("tensor.data_*"), key=lambda path: int(path.name[12:]))
    with files[-1].open("ab") as last:
        last.write(b"x" * 5001)
    (saved / f"tensor.data_{len(files)}").write_bytes(b"old" * 100_000)
    loaded = api.load(saved, store="off", options=COPY)
    assert_equal(loaded.tensors, want)
    stats = loaded.stats
    assert stats.disk_bytes + stats.page_cache_bytes == stats.bytes < 300_000
    assert len(open_checkpoint(saved).shards) == len(files)


def test_a_tensor_may_start_at_any_byte(tmp_path: Path) -> None:
    values = torch.arange(4, dtype=torch.float64)
    raw = bytes(values.numpy().tobytes())
    (tmp_path / "tensor.data_0").write_bytes(b"abc" + raw)
    index: dict[str, Any] = {
        "x": [0, 3, [3], [1], "torch.uint8"],
        "y": [3, 32, [2, 2], [1, 2], "torch.float64"],
    }
    (tmp_path / "tensor_index.json").write_text(json.dumps(index))
    got = load_tensors(tmp_path, store="off")
    assert torch.equal(got["y"], values.reshape(2, 2).t())


def test_tensors_without_elements_need_no_bytes(tmp_path: Path) -> None:
    write_sllm_store(tmp_path, {"a": torch.empty(0, 3), "b": torch.empty(2, 0, 5)})
    assert (tmp_path / "tensor.data_0").stat().st_size == 0
    assert load_tensors(tmp_path, store="off")["b"].shape == (2, 0, 5)
    assert dict(stream_tensors(tmp_path)).keys() == {"a", "b"}


def test_safetensors_beside_it_are_the_checkpoint(saved: Path, tiny_checkpoint: Path) -> None:
    for path in tiny_checkpoint.iterdir():
        path.rename(saved / path.name)
    assert open_checkpoint(saved).format == "safetensors"
    assert "tied" not in load_tensors(saved, store="off")


def test_one_rank_is_loaded_by_its_path_and_all_together_by_none(tmp_path: Path) -> None:
    for rank in range(2):
        write_sllm_store(tmp_path / f"rank_{rank}", some_tensors(rank))
    assert_equal(load_tensors(tmp_path / "rank_1", store="off"), some_tensors(1))
    with pytest.raises(CheckpointNotFound, match="2 ranks") as caught:
        load_tensors(tmp_path, store="off")
    assert "rank_0" in str(caught.value.hint)


# ---- what its writer is known to damage --------------------------------------------------------

Damage = Callable[[Path], None]


def _cut(name: str, nbytes: int) -> Damage:
    def cut(directory: Path) -> None:
        path = directory / name
        path.write_bytes(path.read_bytes()[:nbytes])

    return cut


def _edit(name: str, **changes: Any) -> Damage:
    """Change fields of one line of the index."""

    def edit(directory: Path) -> None:
        path = directory / "tensor_index.json"
        index = json.loads(path.read_text())
        fields = dict(zip(("offset", "size", "shape", "stride", "dtype"), index[name], strict=True))
        index[name] = list((fields | changes).values())
        path.write_text(json.dumps(index))

    return edit


def _longer(nbytes: int) -> Damage:
    """Opened without O_TRUNC, a shorter save leaves the tail of the longer one before it."""

    def add(directory: Path) -> None:
        with (directory / "tensor.data_0").open("ab") as file:
            file.write(bytes(nbytes))

    return add


DAMAGES: dict[str, tuple[Damage, str]] = {
    "an empty file": (_cut("tensor.data_0", 0), "`tensor.data_0` is empty"),
    "a first file cut in a tensor": (_cut("tensor.data_0", 500), "`b`.* 400 to 797.*ends at 500"),
    "a first file cut between two": (_cut("tensor.data_0", 400), "`d`.* 1200 to 1597.*have 1200"),
    "a first file without its padding": (_cut("tensor.data_0", 1597), "with 3 bytes of no tensor"),
    "a last file cut short": (_cut("tensor.data_1", 400), "2000 to 2397.*have 2000.*truncated"),
    "a missing first file": (lambda d: (d / "tensor.data_0").unlink(), "`.*data_0` is missing"),
    "a missing file": (lambda d: (d / "tensor.data_1").rename(d / "tensor.data_2"), "_1` is mis"),
    "a missing last file": (lambda d: (d / "tensor.data_1").unlink(), "1600 to 1997.*have 1600"),
    "a first file longer than itself": (_longer(4096), "over a longer one"),
    "a first file longer by a little": (_longer(8), "`e`.* ends at 1608"),
    "untied names at one offset": (_edit("b", offset=0, size=400), "`a` and `b` .*overlap"),
    "records across each other": (_edit("b", offset=200), "`a` and `b` .*overlap"),
    "a record past the end": (_edit("f", offset=2**62), "takes bytes .*have 2400"),
    "a tensor larger than its record": (_edit("a", size=396), "needs 397 bytes.*has 396"),
    "strides that leave the record": (_edit("a", stride=[2]), "needs 793 bytes.*has 397"),
}


@pytest.fixture
def six(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six tensors of 397 bytes, and 3 of padding each, in two files of at most 1600 bytes."""
    monkeypatch.setattr(sllm_store, "PARTITION_BYTES", 1600)
    tensors = {name: torch.full((397,), ord(name), dtype=torch.uint8) for name in "abcdef"}
    return write_sllm_store(tmp_path / "six", tensors, partition_bytes=1600)


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_refused_in_one_line(six: Path, what: str) -> None:
    damage, message = DAMAGES[what]
    load_tensors(six, store="off")
    damage(six)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tensors(six, store="off")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, CheckpointNotFound)


LINES: dict[str, str] = {
    "not an object": "[]",
    "a line that is none": '{"a": 1}',
    "too few fields": '{"a": [0, 4, [1], [1]]}',
    "an object": '{"a": {"0": 0, "1": 4, "2": [1], "3": [1], "4": "torch.int32"}}',
    "a negative offset": '{"a": [-8, 4, [1], [1], "torch.int32"]}',
    "a negative size": '{"a": [0, -4, [0], [1], "torch.int32"]}',
    "a negative axis": '{"a": [0, 4, [-1], [1], "torch.int32"]}',
    "a negative stride": '{"a": [0, 400, [2], [-1], "torch.int32"]}',
    "NaN": '{"a": [NaN, 4, [1], [1], "torch.int32"]}',
    "Infinity": '{"a": [0, Infinity, [1], [1], "torch.int32"]}',
    "a fraction": '{"a": [0.0, 4, [1], [1], "torch.int32"]}',
    "true": '{"a": [true, 4, [1], [1], "torch.int32"]}',
    "a huge offset": '{"a": [' + "9" * 30 + ', 4, [1], [1], "torch.int32"]}',
    "an endless number": '{"a": [' + "9" * 5000 + ', 4, [1], [1], "torch.int32"]}',
    "a huge shape": '{"a": [0, 4, [4611686018427387904, 8], [0, 0], "torch.int32"]}',
    "a huge stride": '{"a": [0, 400, [3], [9223372036854775807], "torch.int32"]}',
    "too many axes": '{"a": [0, 4, [' + "1," * 70 + "1], [" + "1," * 70 + '1], "torch.int32"]}',
    "fewer strides than axes": '{"a": [0, 4, [1, 1], [1], "torch.int32"]}',
    "an unknown dtype": '{"a": [0, 4, [1], [1], "torch.float31"]}',
    "a dtype without torch": '{"a": [0, 4, [1], [1], "int32"]}',
    "a dtype that safetensors lacks": '{"a": [0, 16, [1], [1], "torch.complex128"]}',
    "a dtype that is a list": '{"a": [0, 4, [1], [1], []]}',
    "a name twice": '{"a": [0, 4, [1], [1], "torch.int32"], "a": [8, 4, [1], [1], "torch.int32"]}',
    "depth": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "brackets alone": '{"a": [' + "[]," * 700_000 + "[]]}",
    "half a surrogate": '{"\\ud800": [0, 4, [1], [1], "torch.int32"]}',
    "no JSON": '{"a": [0, 4, [1], [1], "torch.int32"]',
    "nothing": "",
}


@pytest.mark.parametrize("what", LINES)
def test_a_hostile_index_is_refused_in_one_line(six: Path, what: str) -> None:
    (six / "tensor_index.json").write_text(LINES[what])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(six)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_data_file_that_is_a_directory_is_refused(six: Path) -> None:
    (six / "tensor.data_0").unlink()
    (six / "tensor.data_0").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(six)


def test_data_without_an_index_is_no_checkpoint(six: Path) -> None:
    (six / "tensor_index.json").unlink()
    with pytest.raises(CheckpointNotFound, match="`tensor_index.json` is not"):
        open_checkpoint(six)


def test_a_data_file_that_changes_between_reading_and_opening_is_refused(six: Path) -> None:
    checkpoint = open_checkpoint(six)
    (six / "new").write_bytes((six / "tensor.data_0").read_bytes())
    (six / "new").replace(six / "tensor.data_0")
    with pytest.raises(CheckpointError, match="replaced"):
        load(checkpoint, MAP)


def test_100_000_tensors_are_read(tmp_path: Path) -> None:
    index = {
        f"model.layers.{n}.weight": [8 * n, 8, [2, 2], [2, 1], "torch.int16"]
        for n in range(100_000)
    }
    (tmp_path / "tensor_index.json").write_text(json.dumps(index))
    (tmp_path / "tensor.data_0").write_bytes(bytes(800_000))
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.tensors) == 100_000
    assert all(math.prod(e.shape) * 2 == e.nbytes for e in checkpoint.tensors.values())
