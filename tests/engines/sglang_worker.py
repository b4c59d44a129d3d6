"""Ranks of a real SGLang without its scheduler: each job's model is built and filled once a rank.

``python sglang_worker.py`` reads jobs from stdin, one JSON object a line (arguments of
``ServerArgs``, and ``by_class``), and answers each with a line of JSON: for each rank what the
model's tensors are, or the error that the load ended with. SGLang takes half a minute to import
and has one model a process: this imports once and forks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any

from vllm_worker import digests

ARGUMENTS = {
    "device": "cpu",
    "dtype": "bfloat16",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "disable_radix_cache": True,
    "mem_fraction_static": 0.05,
    "max_total_tokens": 2048,
    "context_length": 128,
    "max_running_requests": 4,
}
TIMEOUT_S = 240


def fill(job: dict[str, Any], rank: int, port: int) -> dict[str, Any]:
    """Load one rank's model as SGLang's model runner does."""
    from sglang.benchmark import one_batch
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader
    from sglang.srt.server_args import ServerArgs

    by_class = job.pop("by_class", False)
    arguments = ServerArgs(**{**ARGUMENTS, **job})
    arguments.resolve_once()
    one_batch.publish(
        arguments,
        role="scheduler",
        ranks=one_batch.SpawnRanks(
            world_rank=one_batch.spawn_world_rank(arguments, tp_rank=rank, pp_rank=0), gpu_id=rank
        ),
    )
    one_batch._init_process_global_configs()
    model_config = one_batch.ModelConfig.from_server_args(arguments)
    one_batch.bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
    one_batch.bootstrap.init_layer_runtime(model_config=model_config)
    load_config = LoadConfig(
        load_format=the_class() if by_class else arguments.load_format,
        model_loader_extra_config=arguments.model_loader_extra_config,
    )
    chosen = loader.get_model_loader(load_config=load_config, model_config=model_config)
    model = chosen.load_model(model_config=model_config, device_config=DeviceConfig("cpu", rank))
    return {"rank": rank, "loader": type(chosen).__name__, "tensors": digests(model)}


def the_class() -> type:
    """What SGLang before 0.5.11 takes as its load format."""
    from sllmctl.integrations.sglang_loader import SllmLoader

    return SllmLoader


def run_rank(job: dict[str, Any], rank: int, port: int, to: int) -> None:
    """The child's whole life."""
    signal.alarm(TIMEOUT_S)
    try:
        answer = fill(job, rank, port)
    except BaseException as exc:
        answer = {"rank": rank, "error": f"{type(exc).__name__}: {exc}"}
    with os.fdopen(to, "w") as pipe:
        json.dump(answer, pipe)
    os._exit(0)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def serve() -> None:
    """Answer jobs until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # SGLang's log goes to stdout
    import sglang.benchmark.one_batch  # noqa: F401 - the children want it
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for line in sys.stdin:
        job = json.loads(line)
        port = free_port()
        pipes = []
        for rank in range(job.get("tp_size", 1)):
            read, write = os.pipe()
            if os.fork() == 0:
                os.close(read)
                run_rank(job, rank, port, write)
            os.close(write)
            pipes.append(read)
        answers = []
        for pipe in pipes:
            with os.fdopen(pipe) as stream:
                text = stream.read()
            answers.append(json.loads(text) if text else {"error": "the rank died"})
            os.wait()
        print(json.dumps(answers), file=out, flush=True)


if __name__ == "__main__":
    serve()
