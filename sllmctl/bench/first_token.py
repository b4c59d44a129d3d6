"""Load a model and make one token, in a process that began with nothing.

``python -m sllmctl.bench.first_token WAY PATH DEVICE`` writes one line: `ANSWER`, and as JSON the
token, when it was there by the system's monotonic clock, and seconds of ``imports``, ``load`` and
``token``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANSWER = "sllmctl first token: "
"""What the line begins with, among all that engines say."""
PROMPT = [11, 12, 13, 14, 15, 16, 17, 18]
_CONTEXT = 64


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.stages[f"{stage}_s"] = now - self.last
        self.last = now


def transformers(path: Path, device: str, clock: _Clock) -> int:
    """transformers' own loader."""
    from transformers import AutoModelForCausalLM

    clock.lap("imports")
    where = None if device == "cpu" else device
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=where)
    clock.lap("load")
    return _token(model, device, clock)


def load_model(path: Path, device: str, clock: _Clock) -> int:
    """`sllmctl.transformers.load_model`, which imports the model's class while bytes move."""
    from sllmctl.transformers import load_model as load

    clock.lap("imports")
    model = load(path, device_map=device, fully_parallel=True)
    clock.lap("load")
    return _token(model, device, clock)


def _token(model: Any, device: str, clock: _Clock) -> int:
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT], device=device)).logits
    token = int(logits[0, -1].argmax())
    clock.lap("token")
    return token


def vllm(path: Path, device: str, clock: _Clock, load_format: str = "auto") -> int:
    """vLLM's offline engine, without compiling anything."""
    from vllm import LLM, SamplingParams

    clock.lap("imports")
    engine = LLM(
        model=str(path), load_format=load_format, enforce_eager=True, max_model_len=_CONTEXT
    )
    clock.lap("load")
    (answer,) = engine.generate(
        {"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False
    )
    clock.lap("token")
    return int(answer.outputs[0].token_ids[0])


def vllm_sllm(path: Path, device: str, clock: _Clock) -> int:
    """vLLM with our loader."""
    return vllm(path, device, clock, "sllm")


def sglang(path: Path, device: str, clock: _Clock, **options: Any) -> int:
    """SGLang's offline engine."""
    import sglang as sgl

    clock.lap("imports")
    engine = sgl.Engine(
        model_path=str(path),
        context_length=_CONTEXT,
        disable_cuda_graph=True,
        device=device.partition(":")[0],
        **options,
    )
    clock.lap("load")
    answer = engine.generate(
        input_ids=PROMPT, sampling_params={"max_new_tokens": 1, "temperature": 0}
    )
    clock.lap("token")
    engine.shutdown()
    return int(answer["output_ids"][0])


def sglang_sllm(path: Path, device: str, clock: _Clock) -> int:
    """SGLang with our loader."""
    return sglang(path, device, clock, model_loader_extra_config='{"sllm": {}}')


WAYS: dict[str, Callable[[Path, str, _Clock], int]] = {
    function.__name__: function
    for function in (transformers, load_model, vllm, vllm_sllm, sglang, sglang_sllm)
}


def main() -> None:
    """Run one way."""
    way, path, device = sys.argv[1:]
    clock = _Clock()
    token = WAYS[way](Path(path), device, clock)
    line = json.dumps({"token": token, "at": clock.last, "stages": clock.stages})
    sys.stdout.write(f"\n{ANSWER}{line}\n")


if __name__ == "__main__":
    main()
