"""The guide for those who come from sllm-store: its code runs on what they have."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import sllmctl
from sllmctl import cli
from sllmctl.core.manifest import Origin
from sllmctl.core.units import parse_size
from sllmctl.core.write.convert import convert
from sllmctl.transformers import load_lora, load_model
from tests.models import make_model

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "migrate-from-sllm-store.md"
TEXT = GUIDE.read_text()
COMMANDS: Any = typer.main.get_command(cli.app)
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| sllm-store |")
]
NEW_COMMANDS = [code for _, new in ROWS for code in re.findall(r"`(sllmctl [a-z][^`]*)`", new)]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_the_python_of_the_guide_runs_on_checkpoints_of_sllm_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("opt", tmp_path / "source")
    models = tmp_path / "models" / "facebook"
    convert(source, models / "opt-1.3b", file_format="sllm-store", origin=Origin())
    assert (models / "opt-1.3b" / "tensor.data_0").exists()
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    if importlib.util.find_spec("peft") is None:
        blocks = [block for block in blocks if "lora" not in block]
    else:
        import peft

        settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(load_model(source), settings).save_pretrained(tmp_path / "adapter")
        convert(
            tmp_path / "adapter",
            models / "opt-1.3b-lora",
            file_format="sllm-store",
            origin=Origin(),
        )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["model"].dtype == torch.float16
    base = names["model"].get_base_model() if len(blocks) > 1 else names["model"]
    expected = load_model(source, torch_dtype="float16")
    assert torch.equal(base.lm_head.weight, expected.lm_head.weight)


@pytest.mark.parametrize("line", NEW_COMMANDS)
def test_a_command_in_a_table_is_one(line: str) -> None:
    name, *rest = shlex.split(line)[1:]
    COMMANDS.commands[name].make_context(name, rest)


def test_the_tables_have_commands_to_look_at() -> None:
    assert len(NEW_COMMANDS) > 12


@pytest.mark.parametrize("function", [load_model, load_lora])
def test_arguments_have_the_order_that_the_guide_lists(function: Any) -> None:
    listed = next(
        old for old, new in ROWS if old.startswith(f"`{function.__name__}(") and "same" in new
    )
    names = re.findall(r"\w+", listed.partition("(")[2])
    taken = [
        parameter.name.replace("model_path", "path")
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    assert names == taken


def test_functions_in_the_tables_are_there() -> None:
    new = " ".join(cell for _, cell in ROWS)
    functions = set(re.findall(r"sllmctl\.(\w+)\(", new))
    assert {"warm", "evict", "status", "load_tensors", "save_tensors"} == functions
    assert all(callable(getattr(sllmctl, function)) for function in functions)
    imports = re.findall(r"from sllmctl\.transformers import [\w, ]+", new)
    assert len(imports) == 2
    for line in imports:
        exec(line)


def test_a_size_of_sllm_store_is_written_with_an_i() -> None:
    assert parse_size("4GiB") == 4 * 2**30
    assert parse_size("4GB") == 4 * 10**9
