"""Transcripts of `convert` and `verify`: what a person, a script and a JSON reader see."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.raw import entry, write_raw


def test_convert_tells_a_person_what_came_out(sllmctl: Run, tiny_checkpoint: Path) -> None:
    done = sllmctl("convert", tiny_checkpoint)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        rf"converted {tiny_checkpoint}: 24 tensors, 10\.1 KB in 1 shard, .* - .*/s", lines[0]
    )
    assert lines[1] == "  models/tiny"
    assert re.fullmatch(r"  read back and compared in [\d.]+ m?s", lines[2])
    assert done.stderr == ""
    again = sllmctl("convert", tiny_checkpoint)
    assert again.returncode == 0
    assert "is there already, from the same source with the same options" in again.stdout
    assert again.stdout.splitlines()[-1] == "  models/tiny"


def test_convert_json_has_every_promised_key(
    sllmctl: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = sllmctl(
        *("convert", tiny_checkpoint, "--output", output, "--max-shard-size", "9KB", "--json")
    )
    document = json.loads(done.stdout)
    assert document["schema"] == "sllmctl.convert/1"
    assert document["source"] == str(tiny_checkpoint)
    assert document["path"] == str(output)
    assert document["tensors"] == 24
    assert document["shards"] > 1
    assert document["gb_per_s"] == pytest.approx(document["bytes"] / document["elapsed_s"] / 1e9)
    assert document["already"] is False
    assert len(list(output.glob("model-*-of-*.safetensors"))) == document["shards"]


def test_convert_quiet_prints_the_path_alone(sllmctl: Run, tiny_checkpoint: Path) -> None:
    for _ in range(2):
        done = sllmctl("convert", tiny_checkpoint, "--quiet", "--storage-path", "st")
        assert (done.returncode, done.stdout, done.stderr) == (0, "st/tiny\n", "")


def test_other_options_fail_with_the_force_hint(sllmctl: Run, tiny_checkpoint: Path) -> None:
    sllmctl("convert", tiny_checkpoint)
    done = sllmctl("convert", tiny_checkpoint, "--dtype", "float32", "--json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: `models/tiny` is there already")
    assert "--force" in done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["kind"]) == ("sllmctl.error/1", "config")
    forced = sllmctl("convert", tiny_checkpoint, "--dtype", "float32", "--force", "--json")
    assert forced.returncode == 0, forced.stderr


def test_no_verify_include_and_exclude(sllmctl: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tiny_checkpoint / "notes.md").touch()
    (tiny_checkpoint / "readme.md").touch()
    output = tmp_path / "out"
    done = sllmctl(
        *("convert", tiny_checkpoint, "--no-verify", "--exclude", "notes*"),
        *("--include", "*.safetensors*", "--include", "*.md", "-o", output),
    )
    assert done.returncode == 0, done.stderr
    assert "read back" not in done.stdout
    written = {path.name for path in output.iterdir()}
    assert written == {"model.safetensors", "readme.md", "sllmctl.json"}


def test_warnings_go_to_stderr(sllmctl: Run, tiny_checkpoint: Path) -> None:
    (tiny_checkpoint / "gone.txt").symlink_to("nowhere")
    done = sllmctl("convert", tiny_checkpoint, "--json")
    assert done.stderr == "warning: `gone.txt` is a broken link and is not copied\n"
    assert json.loads(done.stdout)["warnings"] == ["`gone.txt` is a broken link and is not copied"]


@pytest.mark.parametrize("option", [("--dtype", "int4"), ("--hub", "x"), ("--no-such-option",)])
def test_a_wrong_command_line_is_exit_2(
    sllmctl: Run, tiny_checkpoint: Path, option: tuple[str, ...]
) -> None:
    assert sllmctl("convert", tiny_checkpoint, *option).returncode == 2


def test_a_path_that_is_not_there(sllmctl: Run) -> None:
    done = sllmctl("convert", "./missing")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no `missing`")


def test_verify_tells_a_person_that_all_is_well(sllmctl: Run, tiny_checkpoint: Path) -> None:
    sllmctl("convert", tiny_checkpoint, "--storage-path", "models")
    done = sllmctl("verify", "tiny")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny: every byte is as it was written\n")
    assert sllmctl("verify", "tiny", "--quiet").stdout == "ok\n"


def test_verify_exits_3_and_lists_the_damage(
    sllmctl: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    sllmctl("convert", tiny_checkpoint, "--output", output)
    with (output / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    done = sllmctl("verify", output)
    assert done.returncode == 3
    assert done.stdout.splitlines()[0] == f"{output}: 1 problem"
    assert "is damaged between bytes 0 and" in done.stdout.splitlines()[1]
    document = json.loads(sllmctl("verify", output, "--json").stdout)
    assert document["schema"] == "sllmctl.verify/1"
    assert document["ok"] is False
    (problem,) = document["problems"]
    assert problem.keys() == {"kind", "file", "tensor", "offset", "message"}
    assert (problem["kind"], problem["file"], problem["offset"]) == (
        "digest",
        "model.safetensors",
        0,
    )
    assert sllmctl("verify", output, "--quiet").returncode == 3


def test_verify_of_an_unconverted_checkpoint_says_what_it_checked(
    sllmctl: Run, tiny_checkpoint: Path
) -> None:
    done = sllmctl("verify", tiny_checkpoint)
    assert done.returncode == 0
    assert "24 tensors, structure checked" in done.stdout
    assert "sllmctl did not convert it" in done.stdout


def test_verify_of_nothing_is_exit_1(sllmctl: Run, tmp_path: Path) -> None:
    for model in ("missing", tmp_path):
        done = sllmctl("verify", model)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")


def test_ctrl_c_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    nbytes = 2**30
    source = tmp_path / "source"
    path = write_raw(
        source / "model.safetensors",
        {
            f"t{n}": entry("U8", [nbytes // 4], n * nbytes // 4, (n + 1) * nbytes // 4)
            for n in range(4)
        },
    )
    os.truncate(path, path.stat().st_size + nbytes)
    target = tmp_path / "models" / "model"
    process = subprocess.Popen(
        [sys.executable, "-m", "sllmctl", "convert", source, "--output", target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    shard = target.with_name(".model.partial") / "model.safetensors"
    while process.poll() is None and not shard.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "interrupted\n")
    assert list(target.parent.iterdir()) == []
