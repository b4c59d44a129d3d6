"""Checkpoint conversion and warm loading: model weights into an accelerator at hardware speed.

```python
import sllmctl

tensors = sllmctl.load_tensors("Qwen/Qwen3-8B", "npu:0")   # {name: torch.Tensor}
for name, tensor in sllmctl.stream_tensors("Qwen/Qwen3-8B"): ...
path = sllmctl.convert("Qwen/Qwen3-8B")                    # download, convert, verify
```

Importing this loads neither torch nor any hub client: each comes with the first call that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sllmctl.api import convert as convert
    from sllmctl.api import load_tensors as load_tensors
    from sllmctl.api import save_tensors as save_tensors
    from sllmctl.api import stream_tensors as stream_tensors
    from sllmctl.core.rings import release_staging as release_staging
    from sllmctl.store.manage import evict as evict
    from sllmctl.store.manage import status as status
    from sllmctl.store.manage import warm as warm

_API = dict.fromkeys(("convert", "load_tensors", "save_tensors", "stream_tensors"), "sllmctl.api")
_STORE = dict.fromkeys(("evict", "status", "warm"), "sllmctl.store.manage")
_PUBLIC = _API | _STORE | {"release_staging": "sllmctl.core.rings"}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sllmctl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
