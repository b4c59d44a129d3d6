"""Write the golden checkpoint of the current format: `python -m tests.data.make_golden`.

It is made once a format version and then read for ever: never overwrite one that is committed.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sllmctl.core.manifest import FORMAT_VERSION
from sllmctl.core.write.save import save_tensors

GOLDEN = Path(__file__).parent / f"checkpoint_v{FORMAT_VERSION}"


def golden_tensors() -> dict[str, torch.Tensor]:
    """Fixed values of several element types, two of them tied."""
    embedding = torch.arange(-24, 24).to(torch.bfloat16).reshape(6, 8)
    return {
        "model.embed_tokens.weight": embedding,
        "model.layers.0.weight": torch.linspace(-1, 1, 64).reshape(8, 8),
        "model.layers.0.scale": torch.arange(8.0).to(torch.float8_e4m3fn),
        "model.layers.10.weight": torch.arange(16, dtype=torch.float16),
        "model.layers.2.mask": torch.tensor([True, False, True]),
        "model.norm.weight": torch.tensor(0.5, dtype=torch.float64),
        "model.nothing": torch.empty(0, 3),
        "lm_head.weight": embedding,
        "步": torch.arange(5),
    }


def main() -> None:
    if GOLDEN.exists():
        raise SystemExit(f"{GOLDEN} is there: golden checkpoints are never replaced")
    files = {"config.json": json.dumps({"model_type": "golden"}).encode()}
    save_tensors(golden_tensors(), GOLDEN, files=files, max_shard_bytes=4096 + 300)


if __name__ == "__main__":
    main()
