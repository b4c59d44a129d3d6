"""Whole vLLM engines, one after the other: greedy tokens of each.

``python vllm_engine.py`` reads arguments of ``LLM`` from stdin, one JSON object a line, and answers
each with a line of JSON: the token ids, or the error that the start ended with. Workers are forked
from this process, so that only the first engine has to import vLLM.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any

PROMPTS = ("Hello, my name is", "The capital of France is")


def serve() -> None:
    """Answer jobs until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's log goes to stdout
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {}
        started = time.perf_counter()
        engine = None
        try:
            engine = LLM(
                **{
                    "enforce_eager": True,
                    "max_model_len": 128,
                    "max_num_seqs": 4,
                    "dtype": "bfloat16",
                    "disable_log_stats": True,
                    **job,
                }
            )
            answer["ready_s"] = time.perf_counter() - started
            outputs = engine.generate(list(PROMPTS), sampling, use_tqdm=False)
            answer["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
        except Exception as exc:
            answer["error"] = f"{type(exc).__name__}: {exc}"
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        print(json.dumps(answer), file=out, flush=True)
    os._exit(0)


if __name__ == "__main__":
    serve()
