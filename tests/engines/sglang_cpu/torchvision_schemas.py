"""Let the torchvision of PyPI, which is linked to CUDA, be imported beside torch for the CPU.

SGLang imports it at its start. Its operators cannot be loaded; their schemas are all that the
import wants. A line ``import torchvision_schemas`` in a ``.pth`` file brings this in.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float t) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float t) -> Tensor",
    "roi_align(Tensor i, Tensor r, float s, SymInt h, SymInt w, int n, bool a) -> Tensor",
    "_roi_align_backward(Tensor g, Tensor r, float s, SymInt h, SymInt w, SymInt a, SymInt b, "
    "SymInt c, SymInt d, int n, bool e) -> Tensor",
    "ps_roi_align(Tensor i, Tensor r, float s, SymInt h, SymInt w, int n) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor g, Tensor r, Tensor m, float s, SymInt h, SymInt w, int n, "
    "SymInt a, SymInt b, SymInt c, SymInt d) -> Tensor",
    "ps_roi_pool(Tensor i, Tensor r, float s, SymInt h, SymInt w) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor g, Tensor r, Tensor m, float s, SymInt h, SymInt w, SymInt a, "
    "SymInt b, SymInt c, SymInt d) -> Tensor",
    "roi_pool(Tensor i, Tensor r, float s, SymInt h, SymInt w) -> (Tensor, Tensor)",
    "_roi_pool_backward(Tensor g, Tensor r, Tensor m, float s, SymInt h, SymInt w, SymInt a, "
    "SymInt b, SymInt c, SymInt d) -> Tensor",
    "deform_conv2d(Tensor i, Tensor w, Tensor o, Tensor m, Tensor b, SymInt sh, SymInt sw, "
    "SymInt ph, SymInt pw, SymInt dh, SymInt dw, SymInt g, SymInt og, bool u) -> Tensor",
    "_deform_conv2d_backward(Tensor g, Tensor i, Tensor w, Tensor o, Tensor m, Tensor b, "
    "SymInt sh, SymInt sw, SymInt ph, SymInt pw, SymInt dh, SymInt dw, SymInt gr, SymInt og, "
    "bool u) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Defines the schemas when torchvision is about to be imported; finds nothing itself."""

    def __init__(self) -> None:
        self.library: object = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision" and self.library is None:
            import torch

            self.library = library = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                library.define(schema)
        return None


sys.meta_path.insert(0, BeforeTorchvision())
