"""Transcripts of `load` and `ls`: what a person, a script and a JSON reader see."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_load_tells_a_person_what_came_from_where(sllmctl: Run, tiny_checkpoint: Path) -> None:
    done = sllmctl("load", tiny_checkpoint)
    assert done.returncode == 0, done.stderr
    first, _, *table = done.stdout.splitlines()
    assert re.fullmatch(
        rf"loaded {tiny_checkpoint} to cpu: 24 tensors, 10.1 KB in [\d.]+ ms - [\d.]+ [KM]B/s",
        first,
    )
    assert [row.split()[0] for row in table if row] == ["stage", "open", "plan", "build", "10.1"]
    assert table[-1] == "10.1 KB mapped from the page cache, nothing copied"
    assert done.stderr == ""


def test_load_json_has_every_promised_key(sllmctl: Run, tiny_checkpoint: Path) -> None:
    done = sllmctl("load", tiny_checkpoint, "--json", "--map", "never", "--repeat", "3")
    document = json.loads(done.stdout)
    assert document["schema"] == "sllmctl.load/1"
    assert document["model"] == str(tiny_checkpoint)
    assert document["device"] == "cpu"
    assert document["tensors"] == 24
    assert set(document["stages"]) == {"open_s", "plan_s", "read_s", "copy_s", "build_s"}
    assert set(document["bytes_from"]) == {"disk", "page_cache", "store"}
    assert sum(document["bytes_from"].values()) == document["bytes"] > 0
    assert document["gb_per_s"] == pytest.approx(document["bytes"] / document["elapsed_s"] / 1e9)
    assert document["verified"] is False
    assert len(document["runs"]) == 3
    assert document["elapsed_s"] == sorted(run["elapsed_s"] for run in document["runs"])[1]


def test_load_quiet_prints_the_seconds(sllmctl: Run, tiny_checkpoint: Path) -> None:
    done = sllmctl("load", tiny_checkpoint, "--quiet")
    assert re.fullmatch(r"0\.\d{6}\n", done.stdout)


def test_a_name_is_looked_up_in_the_storage_path(sllmctl: Run, tiny_checkpoint: Path) -> None:
    storage = tiny_checkpoint.parents[1]
    for done in (
        sllmctl("load", "org/tiny", "--storage-path", storage, "--json"),
        sllmctl("load", "org/tiny", "--json", STORAGE_PATH=str(storage)),
    ):
        assert json.loads(done.stdout)["model"] == "org/tiny"


def test_a_failure_is_one_line_and_a_hint(sllmctl: Run) -> None:
    done = sllmctl("load", "Qwen/Qwen3-8B")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: there is no checkpoint `Qwen/Qwen3-8B` in `models`\n\n"
        "hint: run `sllmctl convert Qwen/Qwen3-8B` to download and convert it, "
        "or give --storage-path\n"
    )


def test_a_failure_under_json_is_a_document_as_well(sllmctl: Run) -> None:
    done = sllmctl("load", "./nothing", "--json")
    document = json.loads(done.stdout)
    assert document == {
        "schema": "sllmctl.error/1",
        "kind": "checkpoint_not_found",
        "message": "there is no `nothing`",
        "hint": "`sllmctl ls` lists the checkpoints in the storage path",
        "exit_code": 1,
    }
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no `nothing`")


def test_a_device_that_is_not_there_exits_4(sllmctl: Run, tiny_checkpoint: Path) -> None:
    assert sllmctl("load", tiny_checkpoint, "--device", "npu:0").returncode == 4


@pytest.mark.parametrize("count", ["0", "65", "-1", "x", "²"])
def test_a_count_of_threads_that_makes_no_sense(
    sllmctl: Run, tiny_checkpoint: Path, count: str
) -> None:
    done = sllmctl("load", tiny_checkpoint, SLLMCTL_THREADS=count)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: cannot use `{count}` reader threads\n\nhint: use 1 to 64\n",
    )


@pytest.mark.parametrize("arguments", [["load"], ["load", "x", "--nonsense"], ["nonsense"]])
def test_a_wrong_command_line_exits_2(sllmctl: Run, arguments: list[str]) -> None:
    done = sllmctl(*arguments)
    assert done.returncode == 2
    assert "Usage: " in done.stderr


def test_a_truncated_shard_is_named_with_its_numbers(sllmctl: Run, tiny_checkpoint: Path) -> None:
    shard = tiny_checkpoint / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    done = sllmctl("load", tiny_checkpoint)
    assert done.returncode == 1
    assert "model-00002-of-00002.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_one_line(sllmctl: Run) -> None:
    assert re.fullmatch(r"sllmctl \d+\.\d+\.\d+\n", sllmctl("--version").stdout)


def test_ls_shows_each_checkpoint_in_a_row(sllmctl: Run, tiny_checkpoint: Path) -> None:
    storage = tiny_checkpoint.parents[1]
    broken = storage / "org" / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"\xff" * 16)
    done = sllmctl("ls", "--storage-path", storage)
    title, *rows = done.stdout.splitlines()
    assert title.split() == ["name", "size", "tensors", "warm", "dtypes", "state"]
    assert rows[0].startswith("org/broken") and "damaged: " in rows[0]
    assert re.match(r"org/tiny +10.1 KB +24 +BF16, .*as downloaded", rows[1])
    assert rows[-1] == f"2 in {storage}, 10.1 KB"


def test_ls_json_and_quiet(sllmctl: Run, tiny_checkpoint: Path) -> None:
    storage = tiny_checkpoint.parents[1]
    document = json.loads(sllmctl("ls", "--storage-path", storage, "--json").stdout)
    assert document["schema"] == "sllmctl.ls/1"
    (model,) = document["models"]
    assert model["name"] == "org/tiny"
    assert model["path"] == str(tiny_checkpoint)
    assert model["tensors"] == 24
    assert model["bytes"] > 10_000
    assert model["converted"] is False
    assert "BF16" in model["dtypes"]
    assert sllmctl("ls", "--storage-path", storage, "--quiet").stdout == "org/tiny\n"


def test_ls_of_nothing_says_what_to_do(sllmctl: Run) -> None:
    assert sllmctl("ls").stdout == (
        "no checkpoint in models: `sllmctl convert ORG/NAME` puts one there\n"
    )
    assert sllmctl("ls", "--quiet").stdout == ""


def test_ctrl_c_exits_130(tiny_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "sllmctl", "load", str(tiny_checkpoint)]
    process = subprocess.Popen(
        [*command, "--repeat", "100000000"], stderr=subprocess.PIPE, text=True
    )
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + 60
    while "libtorch_cpu" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "interrupted\n"


def test_a_reader_that_leaves_ends_us_with_141(tiny_checkpoint: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m sllmctl ls --json --storage-path {tiny_checkpoint.parents[1]} "
        '2>/dev/full | true; exit "${PIPESTATUS[0]}"',
        shell=True,
        executable="/bin/bash",
        check=False,
    )
    assert done.returncode == 141
