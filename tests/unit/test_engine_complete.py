"""Nothing of a model stays unwritten without being named: weight loaders as engines have them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sllmctl.errors import CheckpointError
from sllmctl.integrations.engine_complete import missing_tensors, require_complete
from sllmctl.integrations.engine_copy import InitialValues, WeightWrites


class Attention(nn.Module):
    """A fused parameter that three tensors of a checkpoint fill, rows after rows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(4, 16, bias=False)
        self.o_proj = nn.Linear(8, 4, bias=False)


class Layered(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def load(self, tensors: dict[str, torch.Tensor]) -> set[str]:
        rows = {"q_proj": slice(0, 8), "k_proj": slice(8, 12), "v_proj": slice(12, 16)}
        loaded = set()
        parameters = dict(self.named_parameters())
        for name, tensor in tensors.items():
            for part, where in rows.items():
                if part in name:
                    name = name.replace(part, "qkv_proj")
                    parameters[name].data.narrow(0, where.start, where.stop - where.start).copy_(
                        tensor
                    )
                    break
            else:
                parameters[name].data.copy_(tensor)
            loaded.add(name)
        return loaded


def checkpoint() -> dict[str, torch.Tensor]:
    shapes = {"q_proj": (8, 4), "k_proj": (4, 4), "v_proj": (4, 4), "o_proj": (4, 8)}
    return {
        f"layers.{layer}.{part}.weight": torch.randn(shape)
        for layer in range(2)
        for part, shape in shapes.items()
    }


def check(tensors: dict[str, torch.Tensor], level: str = "full", *, claims: bool = True) -> None:
    model = Layered()
    with WeightWrites(model) as writes:
        loaded = model.load(tensors)
    require_complete(
        model,
        writes,
        loaded if claims else None,
        tensors,
        where="`tiny`",
        level=level,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("claims", [True, False])
def test_a_complete_checkpoint_passes(claims: bool) -> None:
    check(checkpoint(), claims=claims)


@pytest.mark.parametrize("claims", [True, False])
def test_a_missing_tensor_is_named(claims: bool) -> None:
    tensors = checkpoint()
    del tensors["layers.1.o_proj.weight"]
    with pytest.raises(CheckpointError) as caught:
        check(tensors, claims=claims)
    assert str(caught.value) == (
        "`tiny` does not fill a Layered: `layers.1.o_proj.weight` got 0 of 128 bytes; "
        "it has no `layers.1.o_proj.weight`"
    )


def test_a_missing_slice_of_a_fused_parameter_is_named_with_its_bytes() -> None:
    tensors = checkpoint()
    del tensors["layers.0.q_proj.weight"]
    with pytest.raises(CheckpointError) as caught:
        check(tensors)
    assert str(caught.value) == (
        "`tiny` does not fill a Layered: `layers.0.qkv_proj.weight` got 128 of 256 bytes; "
        "it has no `layers.0.q_proj.weight`"
    )
    check(tensors, "names")
    check({}, "off")


def test_what_is_missing_everywhere_is_named_by_the_parameter() -> None:
    tensors = {name: t for name, t in checkpoint().items() if "q_proj" not in name}
    with pytest.raises(CheckpointError, match=r"layers.0.qkv_proj.weight. got 128 of 256"):
        check(tensors)


def test_what_every_other_layer_has_is_missed_without_a_table() -> None:
    names = set(checkpoint()) - {"layers.0.v_proj.weight"}
    assert missing_tensors(["layers.0.qkv_proj.weight"], names, {}) == ["layers.0.v_proj.weight"]


ODD, ROW = torch.arange(6) % 2 == 1, torch.ones(4)
WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "whole": lambda p: p.data.copy_(torch.ones(6, 4)),
    "transposed": lambda p: p.data.t().copy_(torch.ones(4, 6)),
    "flat": lambda p: p.data.view(-1).copy_(torch.ones(24)),
    "in halves": lambda p: [p.data[:3].copy_(torch.ones(3, 4)), p.data[3:].fill_(0)],
    "in columns": lambda p: [p.data[:, :1].copy_(torch.ones(6, 1)), p.data[:, 1:].zero_()],
    "by index": lambda p: [p.data.__setitem__(i, torch.ones(4)) for i in range(6)],
    "by advanced index": lambda p: p.data.__setitem__(torch.arange(6), torch.ones(6, 4)),
    "by index in halves": lambda p: [p.data.__setitem__(half, 1.0) for half in (ODD, ~ODD)],
    "by index and as a slice": lambda p: [p.data.__setitem__([0, 1, 2], 1.0), p.data[3:].zero_()],
    "by index_copy_": lambda p: p.data.index_copy_(0, torch.randperm(6), torch.ones(6, 4)),
    "with one scale for all": lambda p: p.data.fill_(torch.tensor([2.0]).item()),
    "as a rank of padding alone": lambda p: [p[:0].copy_(ROW[None][:0]), p[0:].data.fill_(0)],
    "as padding, and a row": lambda p: [p.data.zero_(), p.data[2].copy_(ROW)],
    "as bytes": lambda p: p.data.view(torch.uint8).copy_(torch.ones(6, 16, dtype=torch.uint8)),
    "as another dtype": lambda p: p.data.view(torch.float64).copy_(torch.ones(6, 2)),
    "by new data": lambda p: setattr(p, "data", torch.ones(6, 4)),
    "in overlapping parts": lambda p: [p.data[:4].zero_(), p.data[2:].zero_(), p.data[1:2].zero_()],
}


@pytest.mark.parametrize("how", WRITES)
def test_every_way_to_write_a_parameter_counts(how: str) -> None:
    model = nn.Linear(4, 6, bias=False)
    with torch.no_grad(), WeightWrites(model) as writes:
        WRITES[how](model.weight)
    assert writes.written_bytes(model.weight) == 96


ONE_FOUR = torch.tensor([1, 4])
FLAGS = torch.tensor([True, False, True, False, False, True])
PARTS: dict[str, tuple[Callable[[nn.Parameter], object], int]] = {
    "nothing": (lambda p: p.data.sum(), 0),
    "a flag": (lambda p: p.requires_grad_(False), 0),
    "another tensor": (lambda p: torch.empty(6, 4).copy_(p.data), 0),
    "a row": (lambda p: p.data[2].copy_(torch.ones(4)), 16),
    "a row twice": (lambda p: [p.data[2].zero_(), p.data[2].fill_(1)], 16),
    "a column": (lambda p: p.data[:, 2].copy_(torch.ones(6)), 24),
    "an element": (lambda p: p.data.__setitem__((1, 2), 3.0), 4),
    "two rows by index": (lambda p: p.data.__setitem__(torch.tensor([1, 4]), 1.0), 32),
    "two rows twice": (lambda p: [p.data.__setitem__([1, 4], ROW) for _ in range(2)], 32),
    "rows by flags": (lambda p: p.data.__setitem__(FLAGS, ROW), 48),
    "columns by index": (lambda p: p.data.__setitem__((..., [0, 3]), 1.0), 48),
    "rows of a view": (lambda p: p.data[2:].t().__setitem__([1], torch.ones(1, 4)), 16),
    "rows by index_copy_": (lambda p: p.data.index_copy_(-2, ONE_FOUR, torch.ones(2, 4)), 32),
    "rows by index_fill_": (lambda p: p.data.index_fill_(dim=0, index=ONE_FOUR, value=1.0), 32),
    "elements by index_put_": (lambda p: p.data.index_put_((ONE_FOUR, ONE_FOUR - 1), ROW[:2]), 8),
    "elements by scatter_": (lambda p: p.data.scatter_(1, ONE_FOUR.view(2, 1) // 2, 1.0), 8),
    "a mask's elements": (lambda p: p.data.masked_fill_(FLAGS.view(6, 1), 1.0), 48),
    "a mask's elements in turn": (
        lambda p: p.data.masked_scatter_(FLAGS.view(6, 1), torch.ones(12)),
        48,
    ),
    "a row, and the same by index": (
        lambda p: [p.data[1].copy_(ROW), p.data.__setitem__([1, 4], ROW)],
        32,
    ),
}


@pytest.mark.parametrize("what", PARTS)
def test_parts_count_once_and_reads_not_at_all(what: str) -> None:
    model = nn.Linear(4, 6, bias=False)
    write, expected = PARTS[what]
    with torch.no_grad(), WeightWrites(model) as writes:
        write(model.weight)
    assert writes.written_bytes(model.weight) == expected


def test_what_the_model_says_alone_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.Linear(4, 6) for _ in range(3)))
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad(), WeightWrites(model) as writes:
        model[0].weight.add_(1)
        model[0].bias.copy_(torch.ones(6))
    require_complete(model, writes, set(names), names, where="`x`")
    assert [record.getMessage() for record in caplog.records] == [
        "sllm: nothing was seen to be written to 5 parameters of a Sequential that say they are "
        "loaded: 0.weight, 1.weight, 1.bias, 2.weight, …"
    ]
    with pytest.raises(CheckpointError, match=r"`0.weight` got 0 of 96 bytes"):
        require_complete(model, writes, set(), names, where="`x`")


class Padded(nn.Module):
    """Rows for three tensors and for nothing, as kernels want them, and a bias of zeros."""

    packed_modules_mapping = {"qkv": ["q", "k", "v"]}  # noqa: RUF012

    def __init__(self, made: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({"qkv": nn.ParameterDict({"weight": made(8, 4)})})
        self.bias = nn.Parameter(torch.empty(4))
        with torch.no_grad():
            self.bias[:] = torch.finfo(torch.float32).min


def check_padded(
    made: Callable[..., torch.Tensor], parts: str, *, names: str = "qkv", bias: int = 1
) -> None:
    with torch.device("cpu"), InitialValues() as initial:
        torch.zeros(8, 4)  # gone again: its place may be the weight's
        model = Padded(made)
    initial.stop()
    with torch.no_grad(), WeightWrites(model) as writes:
        for part in parts:
            model.layer["qkv"]["weight"].data["qkv".index(part) * 2 :][:2].copy_(torch.ones(2, 4))
        model.bias[:bias].copy_(torch.ones(bias))
    require_complete(
        model,
        writes,
        None,
        {f"layer.{name}.weight" for name in names},
        where="`x`",
        prefilled=initial.names(model),
    )


@pytest.mark.parametrize(
    "made",
    [
        torch.zeros,
        torch.ones,
        lambda *shape: torch.full(shape, 1.0),
        lambda *shape: torch.empty(shape).zero_(),
        lambda *shape: torch.zeros_like(torch.empty(shape)),
    ],
)
def test_padding_that_the_model_made_itself_may_stay(
    made: Callable[..., torch.Tensor],
) -> None:
    check_padded(made, "qkv")


def test_padding_hides_neither_a_missing_tensor_nor_a_parameter_without_weights() -> None:
    with pytest.raises(
        CheckpointError, match=r"`layer.qkv.weight` got 64 of 128 bytes; .*`layer.v.weight`"
    ):
        check_padded(torch.zeros, "qk", names="qk")
    with pytest.raises(CheckpointError, match=r"`layer.qkv.weight` got 0 of 128 bytes") as caught:
        check_padded(torch.zeros, "")
    assert caught.value.hint is not None and '"check": "off"' in caught.value.hint


def test_a_bias_that_no_checkpoint_has_is_what_the_model_made_it() -> None:
    check_padded(torch.zeros, "qkv", bias=0)
    model = nn.ModuleDict({"layers": nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2))})
    with torch.no_grad(), WeightWrites(model) as writes:
        model["layers"][0].bias.copy_(torch.ones(2))
    weights = {"layers.0.weight", "layers.1.weight"}
    with pytest.raises(CheckpointError, match=r"it has no `layers.1.bias`"):
        require_complete(
            model,
            writes,
            None,
            {"layers.0.bias"},
            where="`x`",
            optional=weights,
            prefilled={"layers.1.bias"},
        )


def test_what_the_model_left_to_the_checkpoint_has_no_padding() -> None:
    with pytest.raises(CheckpointError, match=r"`layer.qkv.weight` got 96 of 128 bytes") as caught:
        check_padded(torch.empty, "qkv")
    assert caught.value.hint is not None and '"check": "names"' in caught.value.hint


def test_a_parameter_that_was_replaced_is_the_models_word() -> None:
    model = nn.Linear(4, 6, bias=False)
    with WeightWrites(model) as writes:
        model.weight = nn.Parameter(torch.ones(6, 4))
    assert writes.written_bytes(model.weight) is None
    require_complete(model, writes, {"weight"}, {"weight"}, where="`x`")
    with pytest.raises(CheckpointError, match="got 0 of 96"):
        require_complete(model, writes, set(), {"weight"}, where="`x`")


def test_optional_and_empty_and_meta_parameters_may_stay_as_they_are() -> None:
    model = nn.Module()
    model.k_scale = nn.Parameter(torch.ones(1))
    model.empty = nn.Parameter(torch.empty(0, 4))
    model.later = nn.Parameter(torch.empty(4, device="meta"))
    with WeightWrites(model) as writes:
        pass
    require_complete(model, writes, set(), set(), where="`x`", optional={"k_scale"})
    with pytest.raises(CheckpointError, match="k_scale"):
        require_complete(model, writes, set(), set(), where="`x`")
