"""The guide to models of transformers: its code runs, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sllmctl.transformers import load_model
from tests.models import make_model

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "transformers.md"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_the_python_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    path = make_model("qwen3", tmp_path / "models" / "Qwen" / "Qwen3-8B")
    for name in ("german", "legal"):
        settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(load_model(path), settings)
        adapted.save_pretrained(tmp_path / "models" / "me" / f"{name}-lora")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    ran = 0
    for block in blocks:
        if 'device_map="npu' not in block:
            exec(block, names)
            ran += 1
    assert ran == 3
    assert (tmp_path / "models/me/legal-lora-2/adapter_model.safetensors").exists()
    assert load_model(tmp_path / "models/me/legal-8b").config.model_type == "qwen3"
