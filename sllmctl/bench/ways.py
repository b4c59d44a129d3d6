"""Ways to load a checkpoint: our own, and those of the libraries that are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sllmctl import __version__, api
from sllmctl.bench.measure import Held, Sample, measure_load, reader_threads, synchronize
from sllmctl.core.checkpoint import Checkpoint, open_checkpoint
from sllmctl.core.devices import find_device
from sllmctl.core.load import LoadOptions
from sllmctl.errors import SllmError

Kind = Literal["limit", "ours", "peer"]
log = logging.getLogger(__name__)
TORCH_FILE = "model.pt"
TENSORIZER_FILE = "model.tensors"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is loaded, and where to.

    Attributes:
        path: The checkpoint.
        scratch: Directory with the same tensors in other formats.
        device: As torch names it.
        socket: Of a store that runs, if one does.
    """

    path: Path
    scratch: Path
    device: str = "cpu"
    socket: Path | None = None
    checkpoint: Checkpoint = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint", open_checkpoint(self.path))

    @property
    def shards(self) -> list[Path]:
        """Its files."""
        return [shard.path for shard in self.checkpoint.shards]

    @property
    def file_bytes(self) -> int:
        """Size of its files."""
        return sum(shard.size for shard in self.checkpoint.shards)


@dataclass(frozen=True, slots=True)
class Way:
    """A way to load every tensor.

    Attributes:
        name: The row's.
        load: Returns the tensors once they are ready.
        package: Distribution whose version is shown.
        module: What has to be importable.
        file: A format of its own: a file in the scratch directory instead of the checkpoint.
        devices: Kinds that it loads to.
        lacks: Says why it cannot run, beyond that, or "".
        maps: What needs no memory that is not filled yet: ``cached`` files, or ``all``, which a
            store has.
    """

    name: str
    load: Callable[[Subject], Held]
    kind: Kind = "peer"
    package: str = "sllmctl"
    module: str = "torch"
    file: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda", "npu")
    lacks: Callable[[Subject], str] = field(default=lambda _: "")
    maps: Literal["none", "cached", "all"] = "none"

    def own_bytes(self, subject: Subject, *, cached: bool) -> int:
        """Memory to have at hand for a load: twice what it fills, for what it needs besides."""
        mapped = self.maps == "all" or (self.maps == "cached" and cached)
        return 0 if mapped or subject.device != "cpu" else 2 * subject.file_bytes

    def files(self, subject: Subject) -> list[Path]:
        """What it reads."""
        return [subject.scratch / self.file] if self.file else subject.shards

    def problem(self, subject: Subject) -> str:
        """Why it cannot run here; "" where it can."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: {self.package}"
        kind = subject.device.partition(":")[0]
        if kind not in self.devices:
            return f"does not load to {kind}, only to {', '.join(self.devices)}"
        return self.lacks(subject)

    def sample(self, subject: Subject) -> Sample:
        """Load, in this process, and read every byte."""
        spec = find_device(subject.device)  # torch knows an NPU only once its plugin is imported
        if spec.kind != "cpu":
            import torch

            torch.zeros(1, device=subject.device)  # whoever comes first sets the device up
            synchronize(subject.device)
        return measure_load(partial(self.load, subject), subject.device)


def version_of(package: str) -> str:
    """Version of an installed distribution; "" where there is none."""
    if package == "sllmctl":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # vLLM's distribution for CPUs, for one, has another name than its package.
        names = importlib.metadata.packages_distributions().get(package, [])
        return importlib.metadata.version(names[0]) if names else ""


# ---- ours --------------------------------------------------------------------------------------


def _ours(subject: Subject, map_files: Literal["auto", "never"] = "auto") -> Held:
    options = LoadOptions(map_files)
    loaded = api.load(subject.path, subject.device, store="off", options=options)
    return Held(loaded.tensors)


def _through_store(subject: Subject) -> Held:
    loaded = api.load(
        subject.path,
        subject.device,
        store="require",
        socket=subject.socket,
        label=subject.path.name,
        options=LoadOptions(),
    )
    return Held(loaded.tensors)


def _our_model(subject: Subject) -> Held:
    from sllmctl.transformers import load_model

    model = load_model(subject.path, device_map=subject.device, store="off")
    return Held(_state(model, subject), model)


def _state(model: Any, subject: Subject) -> Mapping[str, Any]:
    """A model's tensors under the names that the checkpoint has for them."""
    state = model.state_dict()
    return {name: state[name] for name in subject.checkpoint.tensors if name in state}


def _no_config(subject: Subject) -> str:
    if not (subject.path / "config.json").is_file():
        return "the checkpoint has no config.json to build a model from"
    return ""


# ---- libraries ---------------------------------------------------------------------------------


def _safetensors(subject: Subject, *, clone: bool = False, **options: Any) -> Held:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in subject.shards:
        tensors |= load_file(path, device=subject.device, **options)
    if clone:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return Held(tensors)


def _no_pread(_: Subject) -> str:
    from inspect import signature

    from safetensors import torch

    has = "backend" in signature(torch.load_file).parameters
    return "" if has else "this safetensors has no backend=pread"


def _torch_load(subject: Subject, *, mapped: bool) -> Held:
    import torch

    path = subject.scratch / TORCH_FILE
    tensors = torch.load(path, mmap=mapped, weights_only=True, map_location=subject.device)
    return Held(tensors)


def _from_pretrained(subject: Subject) -> Held:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        subject.path, dtype="auto", device_map=None if subject.device == "cpu" else subject.device
    )
    return Held(_state(model, subject), model)


def _runai(subject: Subject, **environment: str) -> Held:
    os.environ.update(environment)
    from runai_model_streamer import SafetensorsStreamer

    streamer = SafetensorsStreamer()
    streamer.__enter__()
    streamer.stream_files([str(path) for path in subject.shards], device=subject.device)
    return Held(dict(streamer.get_tensors()), streamer)


def _fastsafetensors(subject: Subject) -> Held:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), device=subject.device, nogds=True)
    loader.add_filenames({0: [str(path) for path in subject.shards]})
    buffers = loader.copy_files_to_device()
    tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
    return Held(tensors, (loader, buffers))


def _tensorizer(subject: Subject) -> Held:
    from tensorizer import TensorDeserializer

    reader = TensorDeserializer(str(subject.scratch / TENSORIZER_FILE), device=subject.device)
    return Held(dict(reader.items()), reader)


def _instanttensor(subject: Subject) -> Held:
    import instanttensor

    names = [str(path) for path in subject.shards]
    with instanttensor.safe_open(names, framework="pt", device=subject.device) as file:
        return Held(dict(file.tensors()))


def _refuse(_: Subject) -> Held:
    raise SllmError("this way does not run")


OURS = Way("sllmctl", _ours, "ours", maps="cached")
OURS_COPY = Way("sllmctl --map never", partial(_ours, map_files="never"), "ours")
OURS_STORE = Way("sllmctl through the store", _through_store, "ours", maps="all")
OURS_MODEL = Way(
    "sllmctl load_model",
    _our_model,
    "ours",
    module="transformers",
    lacks=_no_config,
    maps="cached",
)
SAFETENSORS = Way(
    "safetensors", _safetensors, package="safetensors", module="safetensors", maps="cached"
)
PREAD = Way(
    "safetensors pread",
    partial(_safetensors, backend="pread"),
    package="safetensors",
    module="safetensors",
    lacks=_no_pread,
)
CLONE = Way(
    "safetensors + clone",
    partial(_safetensors, clone=True),
    package="safetensors",
    module="safetensors",
)
TORCH_MMAP = Way(
    "torch.load mmap",
    partial(_torch_load, mapped=True),
    package="torch",
    file=TORCH_FILE,
    maps="cached",
)
TORCH = Way("torch.load", partial(_torch_load, mapped=False), package="torch", file=TORCH_FILE)
FROM_PRETRAINED = Way(
    "transformers from_pretrained",
    _from_pretrained,
    package="transformers",
    module="transformers",
    lacks=_no_config,
    maps="cached",
)
RUNAI = Way(
    "Run:ai streamer",
    _runai,
    package="runai-model-streamer",
    module="runai_model_streamer",
    devices=("cpu", "cuda"),
)
RUNAI_BUFFERED = Way(
    "Run:ai streamer, buffered",
    partial(
        _runai,
        RUNAI_STREAMER_FS_STRATEGY="sync_buffered",
        RUNAI_STREAMER_CONCURRENCY=str(reader_threads()),
    ),
    package="runai-model-streamer",
    module="runai_model_streamer",
    devices=("cpu", "cuda"),
)
FASTSAFETENSORS = Way(
    "fastsafetensors",
    _fastsafetensors,
    package="fastsafetensors",
    module="fastsafetensors",
    devices=("cpu", "cuda"),
)
TENSORIZER = Way(
    "tensorizer",
    _tensorizer,
    package="tensorizer",
    module="tensorizer",
    file=TENSORIZER_FILE,
    devices=("cpu", "cuda"),
)
INSTANTTENSOR = Way(
    "InstantTensor",
    _instanttensor,
    package="instanttensor",
    module="instanttensor",
    devices=("cuda",),
)
SLLM_STORE = Way(
    "sllm-store",
    _refuse,
    package="serverless-llm-store",
    module="sllm_store",
    devices=("cuda",),
    lacks=lambda _: "its server and its patched engine have to be started by hand",
)
PEERS = (
    SAFETENSORS,
    PREAD,
    TORCH,
    TORCH_MMAP,
    FROM_PRETRAINED,
    RUNAI,
    FASTSAFETENSORS,
    TENSORIZER,
    INSTANTTENSOR,
    SLLM_STORE,
)
PRIVATE_PEERS = (
    PREAD,
    CLONE,
    TORCH,
    RUNAI,
    RUNAI_BUFFERED,
    FASTSAFETENSORS,
    TENSORIZER,
)


# ---- before the first sample -------------------------------------------------------------------


def write_formats(subject: Subject, files: Sequence[str]) -> Sample:
    """Write a checkpoint's tensors as other libraries do; runs in a child."""
    import torch

    tensors = _ours(subject).tensors
    started = time.perf_counter()
    if TORCH_FILE in files:
        torch.save(tensors, subject.scratch / TORCH_FILE)
    if TENSORIZER_FILE in files:
        from tensorizer import TensorSerializer

        writer = TensorSerializer(str(subject.scratch / TENSORIZER_FILE))
        writer.write_state_dict(tensors)
        writer.close()
    return Sample(time.perf_counter() - started)
