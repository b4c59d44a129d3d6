"""`docs/reference/json.md` names every field of every document, and no other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import make_model

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"


def documented(schema: str) -> set[str]:
    """The fields that the page gives a document: first column of its table, or first words."""
    (section,) = re.findall(
        rf"^## `{re.escape(schema)}`\n(.*?)(?=^## )", PAGE.read_text(), re.M | re.S
    )
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) or re.findall(
        r"(?:^|\. )(`\w+`):", section, re.MULTILINE
    )
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} | {"schema"}


def run(*arguments: str, storage: Path, **environment: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "sllmctl", *arguments, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "SLLMCTL_STORAGE_PATH": str(storage), **environment},
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, document


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path with one converted model, and its source beside."""
    root = tmp_path_factory.mktemp("json")
    make_model("qwen3", root / "source")
    code, document = run("convert", str(root / "source"), storage=root / "models")
    assert code == 0
    assert set(document) == documented("sllmctl.convert/1")
    assert set(document["stages"]) == {"write_s", "verify_s"}
    return root / "models"


def test_fields_of_load(models: Path) -> None:
    code, plain = run("load", "source", storage=models)
    assert code == 0
    assert set(plain["stages"]) == {"open_s", "plan_s", "read_s", "copy_s", "build_s"}
    assert set(plain["bytes_from"]) == {"disk", "page_cache", "store"}
    _, repeated = run("load", "source", "--repeat", "2", storage=models)
    _, answered = run(
        "load", "source", "--prompt", "Hello", "--max-new-tokens", "1", storage=models
    )
    of_encoders = {"embedding", "norm"}
    assert set(plain) | set(repeated) | set(answered) == documented(plain["schema"]) - of_encoders
    assert [set(run_) for run_ in repeated["runs"]] == [set(plain)] * 2


def test_fields_of_what_an_encoder_answers() -> None:
    from dataclasses import fields

    from sllmctl.integrations.generate import Embedded, Generated

    page = documented("sllmctl.load/1")
    assert {field.name for kind in (Embedded, Generated) for field in fields(kind)} <= page


def test_fields_of_verify_and_its_problems(models: Path, tmp_path: Path) -> None:
    code, document = run("verify", "source", storage=models)
    assert code == 0
    assert set(document) == documented(document["schema"])
    target = tmp_path / "models" / "damaged"
    target.mkdir(parents=True)
    for file in (models / "source").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = bytearray((target / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (target / "model.safetensors").write_bytes(weights)
    (target / "config.json").write_text("{}")
    code, document = run("verify", "damaged", storage=tmp_path / "models")
    assert code == 3
    (problem,), (warning,) = document["problems"], document["warnings"]
    text = " ".join(PAGE.read_text().split())
    (sentence,) = re.findall(r"A problem has (.*?)a line of text\.", text)
    assert set(problem) == set(warning) <= set(re.findall(r"`(\w+)`", sentence))
    assert {problem["kind"], warning["kind"]} == {"digest", "changed"}


def test_fields_of_ls(models: Path) -> None:
    _, document = run("ls", storage=models)
    assert set(document) == documented(document["schema"])
    row = re.findall(r"^\| `models` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)[0]
    (model,) = document["models"]
    assert set(model) == set(re.findall(r"`(\w+)`", row)) - {"null"}


def test_fields_of_an_error(tmp_path: Path) -> None:
    code, document = run("verify", "nothing", storage=tmp_path)
    section = PAGE.read_text().partition("## Errors")[2]
    assert set(document) == set(re.findall(r"`(\w+)`", section)) - {"null"} | {"schema"}
    assert document["exit_code"] == code == 1


@pytest.fixture
def store(models: Path, tmp_path: Path) -> Iterator[str]:
    """The socket of a store with a small pool."""
    socket = str(tmp_path / "store.sock")
    command = [sys.executable, "-m", "sllmctl", "serve", "--mem-pool-size", "32MiB"]
    environment = {**os.environ, "SLLMCTL_STORAGE_PATH": str(models), "SLLMCTL_SOCKET": socket}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert any(line.startswith("ready") for line in process.stdout)
        yield socket
        process.terminate()


def test_fields_of_what_the_store_answers(models: Path, store: str) -> None:
    _, warm = run("warm", "source", storage=models, SLLMCTL_SOCKET=store)
    assert set(warm) == documented(warm["schema"])
    _, status = run("status", storage=models, SLLMCTL_SOCKET=store)
    assert set(status) == documented(status["schema"])
    section = PAGE.read_text().partition("## `sllmctl.status/1`")[2].partition("\n## ")[0]
    for part in (status["pool"], status["models"][0], status["counters"]):
        assert set(part) <= set(re.findall(r"`(\w+)`", section))
    _, evict = run("evict", "source", storage=models, SLLMCTL_SOCKET=store)
    assert set(evict) == documented(evict["schema"])


def test_fields_of_doctor(tmp_path: Path) -> None:
    _, document = run("doctor", "--only", "PY", "--no-exec", storage=tmp_path)
    assert set(document) == documented(document["schema"])
    section = PAGE.read_text().partition("## `sllmctl.doctor/1`")[2].partition("\n## ")[0]
    for part in (document["facts"], document["checks"][0]):
        assert set(part) <= set(re.findall(r"`(\w+)`", section))
