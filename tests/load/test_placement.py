"""What a device map means, and where slabs put tensors: arithmetic, without any device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sllmctl import api, load_tensors
from sllmctl.core import placement as placement_module
from sllmctl.core import slabs as slabs_module
from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.devices import DeviceSpec
from sllmctl.core.placement import DeviceMap, balance, block_of, fill
from sllmctl.core.slabs import ALIGN_BYTES, Slabs, plan_slabs
from sllmctl.errors import ConfigError, DeviceError, DeviceUnavailable
from tests.conftest import write_checkpoint

CPU, NPU0, NPU1 = DeviceSpec("cpu"), DeviceSpec("npu", 0), DeviceSpec("npu", 1)
SIZES = st.lists(st.integers(0, 5000), max_size=30)


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """Twelve layers of 1000 bytes, and 500 bytes beside them."""
    tensors = {f"model.layers.{i}.{n}.weight": torch.zeros(250) for i in range(12) for n in "a"}
    tensors["model.embed.weight"] = torch.zeros(125)
    return write_checkpoint(tmp_path / "m", {"model.safetensors": tensors})


class TestDeviceMap:
    def test_prefixes_match_on_dots_and_the_longest_wins(self, layers: Path) -> None:
        modules = {"": CPU, "model.layers.1": NPU0, "model.layers.1.a": NPU1, "model.embed": NPU1}
        placed = DeviceMap(modules).place(open_checkpoint(layers))
        assert placed["model.layers.1.a.weight"] == NPU1
        assert placed["model.layers.10.a.weight"] == CPU  # not below `model.layers.1`
        assert placed["model.embed.weight"] == NPU1

    def test_a_tensor_that_no_entry_names_is_an_error(self, layers: Path) -> None:
        with pytest.raises(ConfigError, match=r"says nothing about `model\.layers\.0\.a\.weight`"):
            DeviceMap({"model.embed": CPU}).place(open_checkpoint(layers))

    @pytest.mark.parametrize("name", ["model.layer", "model.layers.12", "layers", "model.embed.w"])
    def test_an_entry_that_no_tensor_is_below_is_an_error(self, layers: Path, name: str) -> None:
        with pytest.raises(ConfigError, match=f"names `{name}`, and .* has no tensor there"):
            load_tensors(layers, device_map={"": "cpu", name: "cpu"}, store="off")

    def test_an_entry_may_be_a_tensor_or_hidden_by_longer_ones(self, layers: Path) -> None:
        modules = {"": CPU, "model": CPU, "model.layers": NPU0, "model.embed.weight": NPU1}
        placed = DeviceMap(modules, exact=True).place(open_checkpoint(layers))
        assert set(placed.values()) == {NPU0, NPU1}

    @pytest.mark.parametrize("load", [api.load, api.start_load, api.load_tensors])
    def test_a_device_beside_a_map_is_an_error(
        self, layers: Path, load: Callable[..., object]
    ) -> None:
        with pytest.raises(ConfigError, match="both device `npu:0` and a device_map"):
            load(layers, "npu:0", device_map={"": "cpu"}, store="off")

    @pytest.mark.parametrize("wrong", [{"": "disk"}, {"": "auto"}, {3: "cpu"}, {"": "tpu"}, "best"])
    def test_what_is_no_device_is_an_error(self, wrong: object) -> None:
        with pytest.raises(ConfigError):
            DeviceMap.parse(wrong)

    def test_accelerators_of_two_kinds_in_one_map_are_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(placement_module, "find_device", lambda name: DeviceSpec.parse(name))
        with pytest.raises(ConfigError, match="two kinds: cuda and npu"):
            DeviceMap.parse({"": "npu:0", "lm_head": "cuda:0", "model": "cpu"})

    def test_a_machine_without_accelerators_loads_into_host_memory(self, layers: Path) -> None:
        for where in ("auto", "balanced", "sequential", {"": "cpu"}, torch.device("cpu")):
            tensors = load_tensors(layers, device_map=where, store="off")
            assert {tensor.device for tensor in tensors.values()} == {torch.device("cpu")}

    def test_an_accelerator_that_is_not_there_is_one_line_with_the_next_step(
        self, layers: Path
    ) -> None:
        for where in ("npu:0", "cuda", {"": "cpu", "model.embed": "npu"}, 0):
            with pytest.raises(DeviceUnavailable, match=r"^cannot use (npu|cuda):0: .*[^.]$") as it:
                load_tensors(layers, device_map=where, store="off")
            assert it.value.exit_code == 4
            assert "doctor" in str(it.value.hint)

    def test_layers_stay_whole_and_in_order(
        self, layers: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(placement_module, "free_memory_bytes", lambda spec: 20_000)
        placed = DeviceMap({}, (NPU0, NPU1), balanced=True).place(open_checkpoint(layers))
        numbers = [placed[f"model.layers.{i}.a.weight"].ordinal for i in range(12)]
        assert numbers == [0] * 6 + [1] * 6
        placed = DeviceMap({}, (NPU0, NPU1)).place(open_checkpoint(layers))
        assert set(placed.values()) == {NPU0}

    def test_too_little_room_names_need_and_free(
        self, layers: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(placement_module, "free_memory_bytes", lambda spec: 5000)
        with pytest.raises(DeviceError, match=r"needs 12\.5 KB, and free are 5 KB on npu:0, 5 KB"):
            DeviceMap({}, (NPU0, NPU1), balanced=True).place(open_checkpoint(layers))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.12.mlp.experts.3.up_proj.weight", "model.layers.12"),
        ("h.0", "h.0"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("scale", "scale"),
    ],
)
def test_a_block_is_a_numbered_layer_or_a_module(name: str, block: str) -> None:
    assert block_of(name) == block


@given(blocks=SIZES, room=st.lists(st.integers(0, 20_000), min_size=1, max_size=5))
def test_blocks_never_exceed_the_room_and_keep_their_order(
    blocks: list[int], room: list[int]
) -> None:
    for choose in (fill, balance):
        chosen = choose(blocks, room)
        if chosen is None:
            continue
        assert chosen == sorted(chosen) and len(chosen) == len(blocks)
        for device, limit in enumerate(room):
            taken = (n for n, where in zip(blocks, chosen, strict=True) if where == device)
            assert sum(taken) <= limit


def test_balancing_gives_each_device_about_the_same() -> None:
    assert balance([10] * 12, [1000] * 4) == [n // 3 for n in range(12)]
    assert balance([100, 1, 1, 1], [1000, 1000]) == [0, 1, 1, 1]
    assert balance([50, 50], [1000, 10]) is None


@given(sizes=SIZES)
def test_slabs_hold_whole_aligned_tensors_that_do_not_touch(sizes: list[int]) -> None:
    limit, slabs_module.SLAB_BYTES = slabs_module.SLAB_BYTES, 4096
    try:
        places, slabs = plan_slabs(sizes)
    finally:
        slabs_module.SLAB_BYTES = limit
    taken: dict[int, int] = {}
    for nbytes, (slab, offset) in zip(sizes, places, strict=True):
        if nbytes:
            assert offset % ALIGN_BYTES == 0
            assert offset >= taken.get(slab, 0)
            taken[slab] = offset + nbytes
    assert all(end <= slabs[slab] for slab, end in taken.items())
    for slab, nbytes in enumerate(slabs):  # larger than the limit only for a tensor that is
        assert nbytes <= 4096 or [place.slab for place in places].count(slab) == 1


def test_memory_that_torch_cannot_have_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs_module, "check_device_memory", lambda spec, nbytes: None)
    with pytest.raises(
        DeviceError, match=r"^cpu cannot allocate \S+ TB of the \S+ TB that the load needs: .+"
    ):
        Slabs(CPU, [2**52])
