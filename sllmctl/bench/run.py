"""A whole run: the checkpoint, the imports, the modes, and the document of it all."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sllmctl import __version__
from sllmctl.bench import load_mode, machine, scale_mode, startup_mode, switch_mode, ways
from sllmctl.bench.budgets import budgets
from sllmctl.bench.document import SCHEMA, Document
from sllmctl.bench.generate import make_qwen3
from sllmctl.bench.imports import import_times
from sllmctl.bench.measure import run_forked
from sllmctl.bench.room import check_room
from sllmctl.bench.rows import Bench, Case, Group, Note, deadline_s
from sllmctl.bench.stores import pool_for, running_store
from sllmctl.bench.ways import Subject
from sllmctl.core.config import resolve_model, storage_path
from sllmctl.core.units import format_size
from sllmctl.errors import ConfigError, SllmError
from sllmctl.store.pool import choose_segment_bytes

_ORDER_SEED = 7
_LOADS = (load_mode.COLD, load_mode.CACHED, load_mode.PRIVATE, *load_mode.STORE_GROUPS)


@dataclass(frozen=True, slots=True)
class Options:
    """What to run.

    Attributes:
        models: Checkpoints, by path or name; none for generated ones.
        size_bytes: Of a generated one.
        rounds: Samples a row.
        modes: Of `MODES`.
        only: Groups of the mode ``load``; none for all.
        device: As torch names it.
        storage: Where names are looked up, and where scratch files go; see
            ``core.config.storage_path``.
    """

    models: Sequence[str] = ()
    size_bytes: int = 10**9
    rounds: int = 5
    modes: Sequence[str] = ("load",)
    only: Sequence[str] = ()
    device: str = "cpu"
    storage: Path | None = None

    def wants(self, *groups: str) -> bool:
        """Whether any of these groups is to be measured."""
        return "load" in self.modes and (not self.only or bool({*groups} & {*self.only}))


def run(options: Options, note: Note) -> Document:
    """Measure, and return everything as one document.

    Raises:
        ConfigError: The options contradict each other, or the disk has no room for the files.
        SllmError: The checkpoint is not there or damaged.
    """
    if options.only and "load" not in options.modes:
        raise ConfigError(
            "--only selects groups of --mode load, and cannot be used with another mode"
        )
    paths = [resolve_model(model, options.storage) for model in options.models]
    if len(paths) > 1 and set(options.modes) != {"switch"}:
        raise ConfigError("only --mode switch takes several models", hint="give one, or none")
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with _scratch(paths, options) as scratch:
        described = machine.describe(scratch, options.device)
        if not paths:
            note(f"generating a checkpoint of {format_size(options.size_bytes)}")
            check_room(scratch, options.size_bytes)
            make_qwen3(scratch / "generated", options.size_bytes)
        subject = Subject(paths[0] if paths else scratch / "generated", scratch, options.device)
        imports = {}
        if any(mode != "load" for mode in options.modes) or options.wants(*_LOADS):
            note("importing the libraries")
            imports = import_times(subject)
        bench = Bench(options.rounds, random.Random(_ORDER_SEED), note)
        groups = [
            group for mode in options.modes for group in _MODES[mode](bench, subject, options)
        ]
        checkpoint = subject.checkpoint
        segment_bytes = choose_segment_bytes(pool_for(subject.file_bytes))
        segments = sum(-(-shard.size // segment_bytes) for shard in checkpoint.shards)
        found = budgets(groups, tensors=len(checkpoint.tensors), segments=segments)
        return {
            "schema": SCHEMA,
            "sllmctl": __version__,
            "started": started,
            "rounds": options.rounds,
            "device": options.device,
            "cold_by": bench.cache.method,
            "checkpoint": {
                "name": subject.path.name,
                "generated": not paths,
                "bytes": checkpoint.nbytes,
                "tensors": len(checkpoint.tensors),
                "shards": len(checkpoint.shards),
            },
            "machine": described,
            "imports": imports,
            "groups": [group.document() for group in groups],
            "budgets": [budget.document() for budget in found],
        }


def _load(bench: Bench, subject: Subject, options: Options) -> Iterator[Group]:
    if options.wants(load_mode.COLD, load_mode.CACHED, load_mode.PRIVATE):
        groups = [
            group
            for group in load_mode.disk_groups(subject, bench.cache)
            if options.wants(group.title)
        ]
        _write_formats(subject, groups, bench.note)
        yield from map(bench.measure, groups)
    if options.wants(*load_mode.STORE_GROUPS):
        bench.note("starting a store")
        try:
            with running_store(pool_for(subject.file_bytes)) as store:
                for group in load_mode.store_groups(subject, bench.cache, store):
                    if options.wants(group.title):
                        yield bench.measure(group)
        except SllmError as exc:
            question = "What does a load through the store cost?"
            yield Group("store", question, "all_s", [], problem=str(exc))
    if options.wants(load_mode.CONVERT):
        check_room(subject.scratch, subject.file_bytes)
        yield bench.measure(load_mode.convert_group(subject, bench.cache))
    if options.wants(load_mode.START):
        yield bench.measure(load_mode.start_group(subject.scratch))


def _switch(bench: Bench, subject: Subject, options: Options) -> Iterator[Group]:
    paths = [resolve_model(model, options.storage) for model in options.models]
    return switch_mode.groups(bench, subject, paths, options.size_bytes)


def _scale(bench: Bench, subject: Subject, options: Options) -> Iterator[Group]:
    return scale_mode.groups(bench, subject)


def _startup(bench: Bench, subject: Subject, options: Options) -> Iterator[Group]:
    return startup_mode.groups(bench, subject)


_MODES = {"load": _load, "switch": _switch, "startup": _startup, "scale": _scale}
MODES = tuple(_MODES)


def _write_formats(subject: Subject, groups: Sequence[Group], note: Note) -> None:
    """Write the files that some ways read instead of the checkpoint's."""
    names = {case.name: case for group in groups for case in group.cases if not case.problem}
    files = [way.file for way in ways.PEERS if way.file and way.name in names]
    files = list(dict.fromkeys(files))
    if not files:
        return
    note(f"writing the checkpoint as {' and '.join(files)}")
    check_room(subject.scratch, len(files) * subject.file_bytes)
    for file in files:
        try:
            run_forked(
                partial(ways.write_formats, subject, [file]),
                deadline_s=deadline_s(subject.file_bytes),
            )
        except SllmError as exc:
            for group in groups:
                group.cases = [_without(case, file, str(exc)) for case in group.cases]


def _without(case: Case, file: str, reason: str) -> Case:
    way = next((way for way in ways.PEERS if way.name == case.name), None)
    if way is None or way.file != file:
        return case
    return replace(case, problem=f"cannot write {file}: {reason}")


@contextmanager
def _scratch(paths: Sequence[Path], options: Options) -> Iterator[Path]:
    """A directory on the disk that is measured: the model's, or that of the storage path.

    Its name begins with a dot, so nobody takes what is in it for a model.
    """
    candidates = [path.parent for path in paths[:1]]
    candidates += [storage_path(options.storage), Path.cwd()]
    for place in candidates:
        try:
            directory = tempfile.mkdtemp(prefix=".sllmctl-bench-", dir=place)
        except OSError:
            continue
        break
    else:
        raise ConfigError(
            f"cannot write to `{candidates[0]}` nor here", hint="run it in a writable directory"
        )
    try:
        yield Path(directory).resolve()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
