"""Real runs of every mode on tiny checkpoints: all agree on the bytes, nothing is left behind."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sllmctl.bench import measure, scale_mode, startup_mode, switch_mode, ways
from sllmctl.bench.plain import write_plain
from sllmctl.bench.rows import Bench, Group
from sllmctl.bench.ways import Subject
from sllmctl.core.checkpoint import open_checkpoint
from tests.docs.test_json import PAGE, documented
from tests.models import make_model

ENVIRONMENT = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path with a tiny model of random weights."""
    root = tmp_path_factory.mktemp("bench")
    make_model("qwen3", root / "tiny")
    return root


def command(storage: Path, *arguments: object) -> list[str]:
    words = ["-m", "sllmctl", "bench", *map(str, arguments), "--storage-path", str(storage)]
    return [sys.executable, *words]


@pytest.fixture(scope="module")
def document(storage: Path) -> dict[str, Any]:
    """One round of the mode `load`, all groups."""
    output = storage / "report"
    done = subprocess.run(
        command(storage, "tiny", "--rounds", 1, "--json", "--output", output),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    assert json.loads((output / "results.json").read_text()) == made
    return made


def rows_of(document: dict[str, Any], title: str) -> dict[str, Any]:
    (group,) = [group for group in document["groups"] if group["title"] == title]
    return {row["name"]: row for row in group["rows"]}


def test_every_group_is_measured(document: dict[str, Any]) -> None:
    titles = [group["title"] for group in document["groups"]]
    assert titles == [
        *("cold", "page cache", "private copy", "first load", "warm"),
        *("idle leases", "convert", "start"),
    ]
    for group in document["groups"]:
        assert not group["problem"]
        for row in group["rows"]:
            missing = row["problem"].startswith(("not installed", "does not load to"))
            assert bool(row["samples"]) != missing, (group["title"], row["name"], row["problem"])


def test_all_ways_have_the_same_bytes(document: dict[str, Any]) -> None:
    checks = {
        sample["check"]
        for title in ("cold", "page cache", "private copy", "first load", "warm")
        for row in rows_of(document, title).values()
        if row["kind"] != "limit" and not row["note"]
        for sample in row["samples"]
    }
    assert len(checks) == 1


def test_cold_comes_from_the_disk_and_hot_does_not(document: dict[str, Any], storage: Path) -> None:
    nbytes = sum(shard.size for shard in open_checkpoint(storage / "tiny").shards)
    (cold,) = rows_of(document, "cold")["safetensors"]["samples"]
    (hot,) = rows_of(document, "page cache")["safetensors"]["samples"]
    assert cold["disk_bytes"] >= 0.9 * nbytes
    assert hot["disk_bytes"] < 0.1 * nbytes


def test_budgets_are_figures_of_the_run(document: dict[str, Any]) -> None:
    texts = " ".join(budget["text"] for budget in document["budgets"])
    for what in (
        "cold load",
        "page cache full",
        "private copy",
        "warm load",
        "first load",
        "idle leases",
        "convert",
        "100,000 tensors",
        "--help",
    ):
        assert what in texts


def test_a_run_leaves_nothing_behind(document: dict[str, Any], storage: Path) -> None:
    assert {path.name for path in storage.iterdir()} == {"tiny", "report"}


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_nothing_behind(storage: Path, ending: int) -> None:
    with subprocess.Popen(
        command(storage, "--size", "80MB", "--rounds", 99, "--only", "idle-leases"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as run:
        while not list(storage.glob(".sllmctl-bench-*/generated/model.safetensors")):
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(ending)
        run.communicate(timeout=60)
        assert run.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[ending]
    assert not list(storage.glob(".sllmctl-bench-*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "scale", "--only", "cold"], "--only"),
        (["tiny", "tiny"], "several models"),
        (["--size", "1MB"], "too small"),
        (["--size", "900TB"], "free"),
        (["--compare", "missing.json"], "missing.json"),
        (["missing"], "no checkpoint"),
        (["tiny", "--device", "cuda:999"], "cuda:999"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(
    storage: Path, arguments: list[str], words: str
) -> None:
    done = subprocess.run(
        command(storage, *arguments), capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == (4 if "--device" in arguments else 1)
    assert words in done.stderr


# ---- the other modes ---------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    # It makes times right, which nobody looks at here, and pytest's memory is large.
    monkeypatch.setattr(measure, "own_memory", lambda: None)
    return Bench(1, random.Random(1), lambda text: None)


def subject_at(tmp_path: Path, model: Path) -> Subject:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Subject(model, scratch)


def measured(group: Group) -> set[str]:
    assert not group.problem
    return {row.name for row in group.rows if row.samples}


def test_switch_plays_a_queue_through_pools(bench: Bench, tmp_path: Path) -> None:
    bench.rounds = 2
    models = [write_plain(tmp_path / f"m{i}", 6_000_000, 10, seed=i) for i in range(3)]
    subject = subject_at(tmp_path, models[0])
    (group,) = switch_mode.groups(bench, subject, models, 0)
    assert len(measured(group)) == 6
    assert all(len(row.samples) == 6 and not row.problem for row in group.rows)
    row = group.row("store, a pool for 3 of 3 models")
    assert row is not None and "50% of what was asked for" in row.note  # three models, six switches
    none = group.row("store, a pool for half a model")
    assert none is not None and len({sample.check for sample in none.samples}) == 3


def test_a_queue_never_asks_for_the_model_that_is_there() -> None:
    queue = switch_mode.queue(3, 500)
    assert all(a != b for a, b in itertools.pairwise(queue))
    counts = [queue.count(model) for model in range(3)]
    assert counts[0] > counts[1] and counts[0] > counts[2] and min(counts) > 50


def test_startup_ends_with_the_same_token(bench: Bench, storage: Path, tmp_path: Path) -> None:
    subject = subject_at(tmp_path, storage / "tiny")
    group = next(startup_mode.groups(bench, subject))  # the others take as long
    assert {"sllmctl load_model", "transformers from_pretrained"} <= measured(group)
    samples = [sample for row in group.rows for sample in row.samples]
    assert len({sample.check for sample in samples}) == 1
    for sample in samples:
        assert set(sample.stages) == {"imports_s", "load_s", "token_s"}
        assert sum(sample.stages.values()) < sample.ready_s


def test_scale_has_rows_for_every_number(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_mode, "MAX_PROCESSES", 2)
    monkeypatch.setattr(scale_mode, "SIZES", (10**6, 2 * 10**6))
    monkeypatch.setattr(scale_mode, "TENSORS", (10, 1_000))
    monkeypatch.setattr(scale_mode, "_BYTES_OF_A_COUNT", 10**6)
    model = write_plain(tmp_path / "m", 10**6, 300)
    groups = list(scale_mode.groups(bench, subject_at(tmp_path, model)))
    counts = scale_mode.process_counts(len(os.sched_getaffinity(0)))
    assert [len(measured(group)) for group in groups] == [
        *(ways * len(counts) for ways in (2, 3, 2, 2)),
        *(4, 4, 4),
    ]
    assert not [row.problem for group in groups for row in group.rows if row.problem]
    own = groups[2].rows[-1].samples[0]
    assert own.ready_s > 0


def test_processes_with_other_bytes_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sllmctl.bench.measure import Sample
    from sllmctl.errors import SllmError

    subject = subject_at(tmp_path, write_plain(tmp_path / "m", 1000, 1))
    monkeypatch.setattr(
        ways.Way, "sample", lambda self, subject: Sample(1.0, 1.0, check=str(os.getpid()))
    )
    with pytest.raises(SllmError, match="different bytes"):
        scale_mode.load_together(ways.OURS, [subject, subject], cached=True)


def test_sizes_fit_on_disk_and_in_memory() -> None:
    assert scale_mode.sizes_up_to(8 * 10**9, 10**12, 10**12) == list(scale_mode.SIZES)
    assert scale_mode.sizes_up_to(8 * 10**9, 5 * 10**8, 10**12) == [10**7, 10**8]
    assert scale_mode.sizes_up_to(8 * 10**9, 10**12, 10**9) == [10**7, 10**8]
    assert scale_mode.sizes_up_to(1, 10**12, 10**12) == [10**7]


def test_a_plain_checkpoint_has_the_tensors_that_were_asked_for(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_plain(tmp_path / "m", 50_000_000, 300))
    assert len(checkpoint.tensors) == 300
    assert checkpoint.nbytes == pytest.approx(50_000_000, rel=1e-4)


def test_the_document_has_the_fields_that_the_page_lists(document: dict[str, Any]) -> None:
    section = PAGE.read_text().partition("## `sllmctl.bench/1`")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", section))
    assert set(document) | {"compared_with"} == documented("sllmctl.bench/1")
    row = document["groups"][0]["rows"][0]
    parts = [document["checkpoint"], document["groups"][0], row, document["budgets"][0]]
    parts += [row["samples"][0], row["figures"], row["figures"]["ready_s"]]
    for part in parts:
        assert set(part) <= listed, set(part) - listed
