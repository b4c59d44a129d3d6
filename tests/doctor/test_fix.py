"""What `--fix` does, does not do, and how it is taken back."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sllmctl.doctor.fix import env_script
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.tree_probe import TreeProbe
from sllmctl.errors import ConfigError
from tests.doctor.conftest import Doctor
from tests.doctor.elf_file import shared_library
from tests.doctor.tree import SITE

Make = Callable[[str], Path]
SOURCE = "root/ServerlessLLM/sllm_store"
GLOG = f"{SOURCE}/sllm_store/libglog.so"


def test_a_dry_run_shows_the_plan_and_touches_nothing(doctor: Doctor, machine: Make) -> None:
    root = machine("libglog.so is missing, the build has it")
    before = sorted(root.rglob("*"))
    done = doctor("--root", root, "--fix", "--dry-run")
    assert done.exit_code == 0
    assert "STORE002: copy /root/ServerlessLLM/sllm_store/build/" in done.stdout
    assert "to undo it: rm /root/ServerlessLLM/sllm_store/sllm_store/libglog.so" in done.stdout
    assert sorted(root.rglob("*")) == before


def test_libglog_is_copied_and_the_check_passes_then(doctor: Doctor, machine: Make) -> None:
    root = machine("libglog.so is missing, the build has it")
    done = doctor("--root", root, "--fix", "--yes")
    assert done.exit_code == 0, done.output
    assert "STORE002 libglog.so is here" in done.stdout
    copied = root / GLOG
    assert copied.is_file() and not copied.is_symlink()
    again = doctor("--root", root, "--fix", "--yes")
    assert again.stdout == "There is nothing here that --fix can fix.\n"


def test_a_broken_link_is_replaced_not_written_through(doctor: Doctor, machine: Make) -> None:
    root = machine("libglog.so is missing, the build has it")
    (root / GLOG).symlink_to("/root/elsewhere/libglog.so")
    assert doctor("--root", root, "--fix", "--yes").exit_code == 0
    assert not (root / GLOG).is_symlink()
    assert not (root / "root/elsewhere").exists()


@pytest.mark.parametrize("name", ["libglog.so of another machine", "a file of the same name"])
def test_a_file_that_is_replaced_is_kept(doctor: Doctor, machine: Make, name: str) -> None:
    glog = name == "libglog.so of another machine"
    root = machine(name if glog else "nothing sourced")
    target = root / (f"{SITE[1:]}/sllm_store/libglog.so" if glog else "root/sllmctl-env.sh")
    if glog:
        built = root / "opt/npu/lib/libglog.so"
        built.write_bytes(shared_library("aarch64", [], [], ""))
    else:
        target.write_text("echo mine\n")
    before = target.read_bytes()
    plan = doctor("--root", root, "--fix", "--dry-run").stdout
    undo = f"mv {str(target).removeprefix(str(root))}.old {str(target).removeprefix(str(root))}"
    assert f"to undo it: {undo}" in plan.replace("~", "/root")
    assert doctor("--root", root, "--fix", "--yes").exit_code == 0
    assert target.read_bytes() != before
    assert target.with_name(target.name + ".old").read_bytes() == before


def test_a_place_that_cannot_be_written_is_one_line(doctor: Doctor, machine: Make) -> None:
    root = machine("nothing sourced")
    (root / "root").rmdir()
    (root / "root").write_text("no directory")
    done = doctor("--root", root, "--fix", "--yes")
    assert isinstance(done.exception, ConfigError), done.exception
    assert "cannot write" in str(done.exception)


def test_deep_ep_gets_its_link(doctor: Doctor, machine: Make) -> None:
    root = machine("deep_ep_cpp out of reach")
    assert doctor("--root", root, "--fix", "--yes").exit_code == 0
    link = next((root / SITE[1:]).glob("deep_ep_cpp*.so"))
    assert link.is_symlink() and link.resolve().is_file()


def test_nobody_to_ask_is_a_refusal(doctor: Doctor, machine: Make) -> None:
    done = doctor("--root", machine("deep_ep_cpp out of reach"), "--fix")
    assert isinstance(done.exception, ConfigError)
    assert "--yes" in (done.exception.hint or "")


def test_an_environment_script_is_written_and_runs(doctor: Doctor, machine: Make) -> None:
    root = machine("guide 2: torch_npu 2.6.0.post3 on CANN 8.2.RC1, a stub first")
    done = doctor("--root", root, "--profile", "base", "--fix", "--yes")
    assert "now run: source /root/sllmctl-env.sh" in done.stdout
    text = (root / "root/sllmctl-env.sh").read_text()
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in text
    assert "set_env.sh --cxx_abi=1" in text
    assert "export no_proxy=localhost,127.0.0.1,::1 NO_PROXY=" in text
    lines = [line for line in text.splitlines() if not line.startswith("source ")]
    script = "\n".join([*lines, 'echo "$LD_LIBRARY_PATH"'])
    ran = subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert ran.stdout == "/usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64/driver\n"


@pytest.mark.parametrize("path", ["/a b/lib", "/x/$(touch HACKED)/lib", "/y/';touch HACKED;'"])
def test_an_environment_script_quotes_what_it_was_given(machine: Make, path: str) -> None:
    root = machine("healthy 8.1.RC1")
    probe = TreeProbe(root)
    m = Machine(probe)
    m.env["LD_LIBRARY_PATH"] = f"{path}:/z"
    first = next(x for x in env_script(m).splitlines() if x.startswith("export LD_LIBRARY_PATH="))
    ran = subprocess.run(
        ["bash", "-euc", f"{first}\nprintf %s \"$LD_LIBRARY_PATH\""],
        capture_output=True, text=True, check=True, cwd=root,
    )  # fmt: skip
    assert ran.stdout == f"{path}:/z"
    assert not (root / "HACKED").exists()
