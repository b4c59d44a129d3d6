"""Slices of host memory as rows for the native gather: every element, in the right order."""

from __future__ import annotations

import pytest
import torch

from sllmctl import native
from sllmctl.integrations.engine_gather import DeviceCopies, Rows

BASE = torch.arange(2 * 6 * 8 * 4, dtype=torch.int32).view(2, 6, 8, 4)

SLICES = {
    "whole": (BASE, 1),
    "rows": (BASE[0, 1:4, 0], 3),
    "columns": (BASE[0, :, :, 1:3], 48),
    "columns of a matrix": (torch.arange(48).view(6, 8)[:, 2:5], 6),
    "one column": (torch.arange(48).view(6, 8)[:, 3], 6),
    "every other row": (torch.arange(48).view(6, 8)[::2], 3),
    "a column slice of stacked matrices": (BASE[:, :, :, 1:3], 96),
    "a scalar": (torch.tensor(7), 1),
    "a row of one": (BASE[1:2, 2:3, 3:4, 1:2], 1),
}


@pytest.mark.parametrize("name", SLICES)
def test_the_gather_packs_a_slice_by_its_rows(name: str) -> None:
    tensor, count = SLICES[name]
    rows = Rows.of(tensor)
    assert rows is not None
    assert rows.rows == count
    target = torch.full(tensor.shape, -1, dtype=tensor.dtype)
    with (
        native.Device("cpu") as device,
        native.Ring(device, 4096, 2) as ring,
        native.Gather(device, ring) as gather,
    ):
        gather.copy(
            target.data_ptr(),
            rows.address,
            rows=rows.rows,
            row_bytes=rows.row_bytes,
            source_stride_bytes=rows.stride_bytes,
        )
        gather.synchronize()
    assert torch.equal(target, tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        *(BASE[:, 1:3, 2:5], torch.arange(48).view(6, 8)[:, ::2][::2], BASE.permute(3, 1, 0, 2)),
        # Rows that share bytes are no rows for the gather.
        *(torch.ones(()).expand(4, 8), torch.arange(8).expand(4, 8)),
        *(torch.arange(4).view(4, 1).expand(4, 8), torch.arange(48).as_strided((4, 8), (4, 1))),
    ],
)
def test_what_the_gather_cannot_take_is_told(tensor: torch.Tensor) -> None:
    assert Rows.of(tensor) is None


def test_copies_within_host_memory_are_left_alone() -> None:
    a, b = torch.zeros(3), torch.ones(3)
    assert not DeviceCopies.crosses(a, b)
    assert not DeviceCopies.crosses(a, 1.0)
    assert not DeviceCopies.crosses(torch.empty(3, device="meta"), b)
    with DeviceCopies() as copies:
        assert copies.moved(torch.Tensor.to, b, torch.float64) is None
        assert copies.moved(torch.Tensor.to, b, "meta") is None
