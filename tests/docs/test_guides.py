"""The guides work: their commands run as shown, on a tiny model, and their Python does too."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.models import make_model

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = DOCS / "guides" / "getting-started.md"
IN_CHINESE = (
    "ascend.md",
    "deploy.md",
    "doctor.md",
    "getting-started.md",
    "migrate-from-sllm-store.md",
    "sglang.md",
    "store.md",
    "transformers.md",
    "vllm.md",
)
# These need a network, or go on until they are stopped.
_NOT_HERE = re.compile(r"Qwen/|^sllmctl (serve|warm|status)\b")
_NUMBERS = re.compile(r"\d[\d.,]*( ?[KMG]?B(/s)?\b| ms\b| s\b)?")


class Step(NamedTuple):
    """A command or a script of the guide, and what the guide shows that it prints."""

    kind: str
    text: str
    output: str


def blocks(page: Path) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = re.findall(
        r"^```(console|python|sh)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )
    return found


def steps() -> Iterator[Step]:
    for kind, text in blocks(GUIDE):
        if kind == "python":
            yield Step(kind, text, "")
        elif kind == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                yield Step(kind, command, output)


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the guide has it, with a tiny model in the place of the generated one."""
    root = tmp_path_factory.mktemp("guide")
    demo, old = root / "downloads" / "demo", root / "downloads" / "old"
    make_model("qwen3", root / "made")
    tensors = {
        name: tensor
        for shard in (root / "made").glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
    shutil.copytree(root / "made", old, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(tensors, old / "pytorch_model.bin")
    (root / "made").rename(demo)
    return root


def run(step: Step, playground: Path) -> subprocess.CompletedProcess[str]:
    words = ["-c", step.text] if step.kind == "python" else ["-m", *shlex.split(step.text)]
    return subprocess.run(
        [sys.executable, *words],
        cwd=playground,
        env={
            **os.environ,
            "SLLMCTL_SOCKET": str(playground / "no.sock"),
            "SLLMCTL_NO_PROGRESS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def damage(playground: Path) -> None:
    """Make the damaged copy that the guide verifies."""
    target = playground / "models" / "damaged"
    shutil.copytree(playground / "models" / "demo", target)
    content = bytearray((target / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (target / "model.safetensors").write_bytes(content)


def shape(text: str) -> str:
    """The first line without numbers and widths."""
    return " ".join(_NUMBERS.sub("#", text.partition("\n")[0]).split())


@pytest.mark.slow
def test_every_step_of_the_guide_does_what_it_shows(playground: Path) -> None:
    ran = 0
    for step in steps():
        if step.kind == "console" and (
            not step.text.startswith("sllmctl ") or _NOT_HERE.search(step.text)
        ):
            continue
        if "damaged" in step.text:
            damage(playground)
        done = run(step, playground)
        if "damaged" in step.text:
            shutil.rmtree(playground / "models" / "damaged")
        expected = 1 if "error: " in step.output else 3 if " problem" in step.output else 0
        assert done.returncode == expected, f"{step.text}: {done.stdout}"
        if expected == 1:
            assert done.stdout.strip() == step.output.strip(), step.text
        elif step.kind == "console":
            assert shape(done.stdout) == shape(step.output), step.text
        ran += 1
    assert ran > 12


@pytest.mark.parametrize("name", IN_CHINESE)
def test_the_chinese_guide_has_the_same_code(name: str) -> None:
    def code(page: Path) -> list[tuple[str, str]]:
        return [(kind, re.sub(r"  # .*", "", text)) for kind, text in blocks(page)]

    assert code(DOCS / "zh" / "guides" / name) == code(DOCS / "guides" / name)


@pytest.mark.parametrize("name", IN_CHINESE)
def test_the_chinese_guide_has_the_same_sections_and_rows(name: str) -> None:
    def outline(page: Path) -> list[str]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        return [line.split()[0] for line in text.splitlines() if re.match(r"#+ |\||- ", line)]

    assert outline(DOCS / "zh" / "guides" / name) == outline(DOCS / "guides" / name)
