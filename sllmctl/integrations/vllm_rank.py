"""Rank state of vLLM: what it depends on, and a vLLM that is started to write it.

``python -m sllmctl.integrations.vllm_rank`` is that vLLM, as a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from sllmctl.core.checkpoint import open_checkpoint
from sllmctl.core.units import format_size
from sllmctl.errors import CheckpointError, ConfigError
from sllmctl.integrations.engine_rank import STATE_NAME, RankKey, checkpoint_digest, mark_verified
from sllmctl.integrations.engine_source import FoundModel

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

_KEEP_IN_PYTHON = ("gguf", "bitsandbytes", "torchao")
"""Quantizations whose loaders keep more than tensors."""
_SHOWN_LINES = 12
SILENCE_S = 3600.0
"""A large model takes its time between two lines of vLLM's log."""


def rank_key(found: FoundModel, model_config: Any) -> RankKey:
    """Say which rank's state this worker wants, and everything that it depends on.

    Raises:
        CheckpointError: Such a model's state cannot be kept; the message says why.
    """
    import vllm
    from vllm.config import get_current_vllm_config
    from vllm.distributed import get_pp_group, get_tp_group
    from vllm.distributed.parallel_state import get_dp_group
    from vllm.platforms import current_platform

    if found.path is None or found.checkpoint is None or not found.path.is_dir():
        raise CheckpointError(
            f"`{found.model}` has no directory here that a rank state could be in"
        )
    parallel = get_current_vllm_config().parallel_config
    experts_parallel = bool(getattr(parallel, "enable_expert_parallel", False))
    if experts_parallel and getattr(parallel, "enable_eplb", False):
        raise CheckpointError("experts that move between ranks leave no state to keep")
    if model_config.quantization in _KEEP_IN_PYTHON:
        raise CheckpointError(f"{model_config.quantization} keeps more than tensors in a model")
    tp, pp = get_tp_group(), get_pp_group()
    # vLLM cuts experts among all of these, whether or not it hands them out whole.
    dp_size, pcp_size = parallel.data_parallel_size, _context_parallel_size(parallel)
    dp_rank = get_dp_group().rank_in_group if dp_size > 1 else 0
    made_by = {
        "engine": "vllm",
        "engine_version": vllm.__version__,
        "platform": _platform(current_platform),
        "device": _device(current_platform),
        "checkpoint": checkpoint_digest(found.checkpoint),
        "config": _config_digest(model_config.hf_config),
        "architecture": ", ".join(getattr(model_config.hf_config, "architectures", None) or ()),
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "quantization": model_config.quantization,
        "tensor_parallel_size": tp.world_size,
        "pipeline_parallel_size": pp.world_size,
        "data_parallel_size": dp_size,
        "prefill_context_parallel_size": pcp_size,
        "expert_parallel_size": dp_size * pcp_size * tp.world_size if experts_parallel else 1,
        "expert_placement": getattr(parallel, "expert_placement_strategy", "linear")
        if experts_parallel
        else None,
        "runner": getattr(model_config, "runner_type", None),
        "convert": getattr(model_config, "convert_type", None),
        "layer_partition": os.environ.get("VLLM_PP_LAYER_PARTITION"),
        "multimodal": _multimodal(getattr(model_config, "multimodal_config", None)),
    }
    copy = dp_rank * pcp_size + _context_parallel_rank(pcp_size)
    rank = (copy * pp.world_size + pp.rank_in_group) * tp.world_size + tp.rank_in_group
    return RankKey(found.path, rank, made_by)


def _multimodal(config: Any) -> str | None:
    """Which encoders a model has, and whether its ranks cut them."""
    if config is None:
        return None
    settings = ("mm_encoder_tp_mode", "language_model_only", "mm_encoder_only")
    return ", ".join(f"{name}={getattr(config, name, None)}" for name in settings)


def _context_parallel_size(parallel: Any) -> int:
    return int(getattr(parallel, "prefill_context_parallel_size", 1))  # older vLLM has none


def _context_parallel_rank(size: int) -> int:
    if size == 1:
        return 0
    from vllm.distributed.parallel_state import get_pcp_group

    return int(get_pcp_group().rank_in_group)


def _platform(platform: Any) -> str:
    """The kind of device, and the version of the plugin that brings it."""
    package = type(platform).__module__.partition(".")[0]
    if package == "vllm":
        return str(platform.device_name)
    try:
        return f"{platform.device_name}, {package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{platform.device_name}, {package}"


def _device(platform: Any) -> str | None:
    """The model of the device: vLLM pads some quantized weights as its kernels there want them."""
    try:
        return str(platform.get_device_name())
    except (NotImplementedError, RuntimeError):
        return None


def _config_digest(config: Any) -> str:
    document = dict(config.to_dict())
    for key in ("_name_or_path", "transformers_version"):
        document.pop(key, None)
    text = json.dumps(document, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def require_plain_state(model: nn.Module) -> None:
    """See that a model is made of its tensors alone.

    Raises:
        CheckpointError: vLLM quantizes a part of it while it loads.
    """
    for name, module in model.named_modules():
        if getattr(getattr(module, "quant_method", None), "uses_meta_device", False):
            raise CheckpointError(f"vLLM quantizes `{name}` while it loads it")


def require_vllm() -> None:
    """See that vLLM is installed here.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "cannot write a rank state: vLLM is not installed in this Python environment",
            hint="install sllmctl into vLLM's environment, and run this there",
        )


def write_rank_states(
    path: Path,
    *,
    tensor_parallel_size: int,
    engine_args: Mapping[str, Any] | None = None,
    verified: bool = False,
) -> list[Path]:
    """Start vLLM once, so that each of its ranks writes its state of a checkpoint.

    Args:
        path: The checkpoint.
        tensor_parallel_size: Number of ranks that share a stage of it.
        engine_args: Further arguments of vLLM's ``LLM``, as they will be when it serves.
        verified: The checkpoint's bytes have just been compared with its digests.

    Returns:
        The states' directories, one a rank, of those that were there already too.

    Raises:
        ConfigError: There is no vLLM here.
        CheckpointError: vLLM did not start, or could not write the states; the message ends with
            its log's last words.
    """
    require_vllm()
    before = checkpoint_digest(open_checkpoint(path))
    arguments = {
        "enforce_eager": True,
        **(engine_args or {}),
        "model": str(path),
        "tensor_parallel_size": tensor_parallel_size,
    }
    ranks = tensor_parallel_size
    for size in ("pipeline_parallel_size", "prefill_context_parallel_size"):
        ranks *= int(arguments.get(size) or 1)
    command = [sys.executable, "-m", __name__, json.dumps(arguments)]
    # The ranks tell in their log what they wrote: it comes here, whatever the user does with it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_LOGGING_")}
    environment |= {"VLLM_CONFIGURE_LOGGING": "1", "VLLM_LOGGING_COLOR": "0"}
    last: deque[str] = deque(maxlen=_SHOWN_LINES)
    written: dict[Path, None] = {}
    # In a session of its own: its workers end with it when we are interrupted.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    ) as process:
        try:
            for line in _lines(process, silence_s=SILENCE_S):
                log.debug("%s", line)
                last.append(line)
                # A draft may keep its state too, in its own checkpoint.
                place = _state_in(line)
                if place is not None and place.parents[2].resolve() == path.resolve():
                    written[place] = None
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode or len(written) < ranks:
        raise CheckpointError(
            f"vLLM did not write the rank state of `{path}` (exit code {process.returncode}, "
            f"{len(written)} of {ranks} ranks)",
            hint="the end of its log: " + " | ".join(last),
        )
    if verified and checkpoint_digest(open_checkpoint(path)) == before:
        for state in written:
            mark_verified(state)
    return sorted(written)


def _lines(process: subprocess.Popen[bytes], *, silence_s: float) -> Iterator[str]:
    """Lines of a process's output.

    Raises:
        CheckpointError: It has said nothing for so long.
    """
    assert process.stdout is not None
    rest = b""
    # `select` refuses descriptors from 1024 on, which a process with many files open gets.
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while True:
        if not poll.poll(silence_s * 1000):
            raise CheckpointError(f"vLLM has logged nothing for {silence_s:.0f} s")
        data = os.read(process.stdout.fileno(), 1 << 16)
        *lines, rest = (rest + data).split(b"\n") if data else (rest, b"")
        yield from (line.decode("utf-8", "replace").rstrip() for line in lines if line)
        if not data:
            return


_MARK = "sllm rank state: "


def announce(key: RankKey) -> str:
    """The log line by which the process that started vLLM knows of a state."""
    return f"{_MARK}{key.path}"


def _state_in(line: str) -> Path | None:
    _, mark, text = line.partition(_MARK)
    place = Path(text.strip())
    return place if mark and (place / STATE_NAME).exists() else None


def main(arguments: dict[str, Any]) -> None:
    """Start vLLM with arguments of ``LLM``; its loader does the rest."""
    from vllm import LLM

    # The small ones suffice: nothing is asked of this engine.
    small = {"max_model_len": 128, "max_num_seqs": 1}
    extra = {"rank_state": "auto", "storage_path": str(Path(arguments["model"]).parent)}
    LLM(**{**small, **arguments, "load_format": "sllm", "model_loader_extra_config": extra})


def describe_states(states: list[Path]) -> str:
    """Say in one line what was written."""
    nbytes = sum(file.stat().st_size for state in states for file in state.glob("*.safetensors"))
    return f"rank state for vLLM: {len(states)} ranks, {format_size(nbytes)}"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
