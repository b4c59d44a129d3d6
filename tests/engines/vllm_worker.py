"""One rank of a real vLLM without its scheduler: models are built and filled, one after the other.

``python vllm_worker.py RANK RANKS RENDEZVOUS`` reads jobs from stdin, one JSON object a line
(arguments of ``EngineArgs``; ``reload``, ``draft``, ``stages``), and answers each with a line of
JSON: what the model's tensors are, or the error that the load ended with. vLLM takes 15 s to import
and 100 ms to fill a tiny model: this is how many of them can be tried.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from typing import Any

import torch


def digests(model: torch.nn.Module) -> dict[str, str]:
    """A digest of every tensor of a model: dtype, shape, bytes."""
    found = {}
    for name, tensor in model.state_dict().items():
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        text = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        found[name] = hashlib.sha256(text + plain.numpy().tobytes()).hexdigest()[:16]
    return found


def serve(rank: int, ranks: int, rendezvous: str) -> None:
    """Answer jobs until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's log goes to stdout
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.model_loader.reload.inplace import reload_weights
    from vllm.plugins import load_general_plugins
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()
    load_general_plugins()
    ready = False
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        again, draft, stages = job.pop("reload", None), job.pop("draft", None), job.pop("stages", 1)
        answer: dict[str, Any] = {"rank": rank}
        try:
            config = EngineArgs(
                **{"enforce_eager": True, "max_model_len": 128, "dtype": "bfloat16", **job},
                tensor_parallel_size=ranks // stages,
                pipeline_parallel_size=stages,
                disable_log_stats=True,
            ).create_engine_config()
            with set_current_vllm_config(config):
                if not ready:
                    init_distributed_environment(
                        ranks, rank, f"file://{rendezvous}", local_rank=rank, backend="gloo"
                    )
                    ready = True
                # Anew for each: which groups there are depends on the model.
                destroy_model_parallel()
                initialize_model_parallel(ranks // stages, stages)
                model = get_model(vllm_config=config)
                answer["tensors"] = digests(model)
                if config.speculative_config is not None:
                    head = get_model(
                        vllm_config=config,
                        model_config=config.speculative_config.draft_model_config,
                        prefix="head",
                    )
                    answer["head"] = digests(head)
                    answer["has_own_embeddings"] = head.has_own_embed_tokens
                if draft is not None:
                    # As speculative decoding does: the same loader settings, another model.
                    other = EngineArgs(model=draft, dtype="bfloat16", max_model_len=128)
                    drafting = get_model(
                        vllm_config=config,
                        model_config=other.create_model_config(),
                        prefix="draft_model",
                    )
                    answer["draft"] = digests(drafting)
                if again is not None:
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.zero_()
                    reload_weights(config, model, None, again or None, True)
                    answer["reloaded"] = digests(model)
                del model
        except Exception as exc:
            answer["error"] = f"{type(exc).__name__}: {exc}"
        gc.collect()
        print(json.dumps(answer), file=out, flush=True)
    os._exit(0)  # vLLM's own goodbye to the other ranks may hang


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
