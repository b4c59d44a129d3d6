"""``--mode startup``: from the start of a process to a model's first token."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from sllmctl.bench.first_token import ANSWER
from sllmctl.bench.measure import Sample, cpu_seconds, run_forked
from sllmctl.bench.rows import Bench, Case, Group, deadline_s
from sllmctl.bench.stores import Store, pool_for, running_store
from sllmctl.bench.ways import OURS_STORE, Kind, Subject, version_of
from sllmctl.core.header import one_line
from sllmctl.errors import SllmError

MOST_ROUNDS = 3
"""An engine takes a minute to start; five rounds of five such rows are half an hour."""

_ENGINE_S = 300.0
_IMPORTS = "its load contains most of the imports, which run while bytes move"
# Way of `first_token`, row, package behind it, module, seconds that an engine may take.
_WAYS: tuple[tuple[str, str, Kind, str, float], ...] = (
    ("transformers", "transformers from_pretrained", "peer", "transformers", 0),
    ("load_model", "sllmctl load_model", "ours", "transformers", 0),
    ("vllm", "vLLM, its own loader", "peer", "vllm", _ENGINE_S),
    ("vllm_sllm", "vLLM, sllmctl's loader", "ours", "vllm", _ENGINE_S),
    ("sglang", "SGLang, its own loader", "peer", "sglang", _ENGINE_S),
    ("sglang_sllm", "SGLang, sllmctl's loader", "ours", "sglang", _ENGINE_S),
)


def groups(bench: Bench, subject: Subject) -> Iterator[Group]:
    """From a page cache that has nothing of the checkpoint, from a full one, and from a store."""
    bench = replace(bench, rounds=min(bench.rounds, MOST_ROUNDS))
    for title, state, prepare in (
        ("page cache empty", "nothing of the checkpoint in memory", bench.cache.make_cold),
        ("page cache full", "all of it in the page cache", bench.cache.make_hot),
    ):
        cases = [_case(subject, *way, partial(prepare, subject.shards), None) for way in _WAYS]
        yield bench.measure(_group(f"first token, {title}", state, cases, subject))
    state = "all of it in a store and nothing in the page cache"
    try:
        with running_store(pool_for(subject.file_bytes)) as store:
            prepare_cold = partial(bench.cache.make_cold, subject.shards)
            cases = [_case(subject, *way, prepare_cold, store) for way in _WAYS if way[2] == "ours"]
            group = _group("first token, store warm", state, cases, subject)
            _fill(subject, store)
            yield bench.measure(group)
    except SllmError as exc:
        group = _group("first token, store warm", state, [], subject)
        group.problem = str(exc)
        yield group


def _group(title: str, state: str, cases: list[Case], subject: Subject) -> Group:
    question = (
        f"How long from the start of a process to the first token, with {state}? "
        f"{MOST_ROUNDS} rounds at most."
    )
    reference = "transformers from_pretrained"
    return Group(
        title, question, "ready_s", cases, subject.file_bytes, (), reference, mode="startup"
    )


def _case(
    subject: Subject,
    way: str,
    name: str,
    kind: Kind,
    package: str,
    extra_s: float,
    prepare: Callable[[], None],
    store: Store | None,
) -> Case:
    problem = ""
    if importlib.util.find_spec(package) is None:
        problem = f"not installed: {package}"
    elif not (subject.path / "config.json").is_file():
        problem = "the checkpoint has no config.json to build a model from"
    version = version_of("sllmctl" if package == "transformers" and kind == "ours" else package)
    run = partial(_run, way, subject, store)
    note = "" if way != "load_model" else _IMPORTS
    return Case(name, kind, run, prepare, version, problem, note=note, extra_s=extra_s)


def _fill(subject: Subject, store: Store) -> None:
    run_forked(
        partial(OURS_STORE.sample, replace(subject, socket=store.socket)),
        deadline_s=deadline_s(subject.file_bytes),
    )


def _run(way: str, subject: Subject, store: Store | None) -> Sample:
    """Run a process to its first token; the time that it takes to end is not counted.

    Raises:
        SllmError: It failed; the message is the last line that names an error.
    """
    socket = store.socket if store is not None else subject.scratch / "no-store.sock"
    environment = {
        **os.environ,
        "SLLMCTL_SOCKET": str(socket),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # GiB: by itself vLLM for CPUs takes most of the memory for its cache, and touches it all.
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    command = [sys.executable, "-m", "sllmctl.bench.first_token", way]
    started = time.monotonic()
    done = subprocess.run(
        [*command, str(subject.path), subject.device],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        why = _why(done.stdout + done.stderr)
        raise SllmError(why or f"exit code {done.returncode}")
    # Engines go on talking after it.
    lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not lines:
        raise SllmError("it ended without a token")
    answer = json.loads(lines[-1].removeprefix(ANSWER))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(
        answer["at"] - started,
        cpu_s=cpu_seconds(resource.RUSAGE_CHILDREN),
        peak_bytes=usage.ru_maxrss * 1024,
        check=f"token {answer['token']}",
        stages=answer["stages"],
    )


def _why(output: str) -> str:
    """The error in an engine's output: its last, but not one that points at another process's."""
    lines = output.strip().splitlines()
    errors = [line for line in lines if "Error: " in line and "root cause above" not in line]
    return one_line((errors or lines or [""])[-1].strip())
