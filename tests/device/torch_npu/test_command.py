"""`sllmctl load --device` in a process of its own, on a machine with NPUs and on half of one."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run, sllmctl  # noqa: F401


def test_load_onto_an_npu_says_what_it_did(sllmctl: Run, checkpoint: Path) -> None:  # noqa: F811
    done = sllmctl("load", checkpoint, "--device", "npu:1", "--json", "--repeat", "2")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # nothing that torch_npu prints is in the way
    assert document["device"] == "npu:1"
    assert sum(document["bytes_from"].values()) == document["bytes"]
    assert document["mapped_bytes"] == 0
    assert [run["device"] for run in document["runs"]] == ["npu:1", "npu:1"]


def test_auto_finds_the_npu(sllmctl: Run, checkpoint: Path) -> None:  # noqa: F811
    done = sllmctl("load", checkpoint, "--device", "auto")
    assert f"loaded {checkpoint} to npu:0: 24 tensors" in done.stdout
    assert "copied from the page cache" in done.stdout


def test_a_variable_that_hides_every_device_is_named(
    sllmctl: Run,  # noqa: F811
    checkpoint: Path,
) -> None:
    done = sllmctl(
        *("load", checkpoint, "--device", "npu"),
        ACLEMU_DEVICES="0",
        ASCEND_RT_VISIBLE_DEVICES="9",
    )
    assert done.returncode == 4
    assert done.stderr.endswith(
        "error: cannot use npu:0: torch sees no device, with ASCEND_RT_VISIBLE_DEVICES=`9`\n\n"
        "hint: unset ASCEND_RT_VISIBLE_DEVICES, or name in it the devices to use\n"
    )


def test_without_cann_an_npu_is_refused_and_the_cpu_serves(
    sllmctl: Run,  # noqa: F811
    checkpoint: Path,
) -> None:
    refused = sllmctl("load", checkpoint, "--device", "npu:0", LD_LIBRARY_PATH="")
    assert refused.returncode == 4
    assert "torch_npu cannot be loaded: lib" in refused.stderr
    assert "sllmctl doctor" in refused.stderr
    served = sllmctl("load", checkpoint, "--device", "auto", LD_LIBRARY_PATH="")
    assert served.returncode == 0, served.stderr
    assert f"loaded {checkpoint} to cpu: " in served.stdout
