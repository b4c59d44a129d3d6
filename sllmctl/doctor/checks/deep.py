"""DEEP: the devices themselves, in child processes that may crash, hang and be killed."""

from __future__ import annotations

from sllmctl.doctor.check import Finding, check, cmd, fail, ok, say
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.probe import Ran

TIMEOUT_S = 60.0
IMPORT = "import torch, torch_npu; print(torch_npu.__version__)"
COUNT = "import torch, torch_npu; print(torch.npu.device_count())"
COPY = (
    "import torch, torch_npu\n"
    "for i in range(torch.npu.device_count()):\n"
    "    assert torch.ones(1).to(f'npu:{i}').cpu().item() == 1\n"
    "print('copied')"
)
PIN = "import torch, torch_npu; torch.empty(64 << 20, dtype=torch.uint8).pin_memory(); print('ok')"


def _child(m: Machine, script: str) -> tuple[Ran, str]:
    """A child with a script, and the last line that it said."""
    ran = m.probe.run([m.probe.host.executable, "-c", script], TIMEOUT_S)
    said = (ran.out if ran.code == 0 else ran.err or ran.out).strip().splitlines()
    lines = [line for line in said if "ERR99999" not in line]
    return ran, lines[-1][:300] if lines else f"exit {ran.code}"


def _hung(name: str) -> Finding:
    return fail(
        say("{name} does not end within {seconds} s", name=name, seconds=int(TIMEOUT_S)),
        cmd(name, "killed"),
        advice=say("a device hangs: look into `dmesg`, then reset it or reboot"),
    )


@check(
    "DEEP001",
    title="torch_npu can be imported",
    why="the import loads every library of CANN and the driver: what is missing shows here",
    looks_at="a child process that imports torch_npu (60 s at most)",
    level=2,
    needs=("PY004",),
)
def imports(m: Machine) -> Finding:
    ran, said = _child(m, IMPORT)
    if ran.code == 0:
        return ok(say("torch_npu can be imported"), cmd("import torch_npu", said))
    if ran.code is None:
        return _hung("import torch_npu")
    return fail(
        say("torch_npu cannot be imported: {error}", error=said),
        cmd("import torch_npu", said),
        fix="python -c 'import torch_npu' 2>&1 | sllmctl doctor --log -",
    )


@check(
    "DEEP002",
    title="torch_npu sees the cards",
    why="a count that differs from the device nodes means that cards are hidden or held",
    looks_at="torch.npu.device_count() in a child, against /dev and ASCEND_RT_VISIBLE_DEVICES",
    level=2,
    needs=("DEEP001", "DRV003"),
)
def count(m: Machine) -> Finding:
    visible = m.env.get("ASCEND_RT_VISIBLE_DEVICES")
    wanted = len(visible.split(",")) if visible else len(m.cards)
    ran, said = _child(m, COUNT)
    if ran.code is None:
        return _hung("torch.npu.device_count()")
    if ran.code == 0 and said == str(wanted):
        return ok(say("torch_npu sees {count} cards", count=wanted))
    return fail(
        say("torch_npu sees {said} cards, {wanted} are here", said=said, wanted=wanted),
        cmd("torch.npu.device_count()", said),
        fix="npu-smi info",
    )


@check(
    "DEEP003",
    title="each card takes a copy",
    why="a card may be listed and yet fail at the first copy",
    looks_at="one element copied to each visible card and back, in a child",
    level=2,
    needs=("DEEP002",),
)
def copies(m: Machine) -> Finding:
    ran, said = _child(m, COPY)
    if ran.code == 0:
        return ok(say("each card takes a copy"))
    if ran.code is None:
        return _hung("tensor.to('npu')")
    return fail(
        say("a copy to a card fails: {error}", error=said),
        cmd("tensor.to('npu')", said),
        fix="npu-smi info",
    )


@check(
    "DEEP004",
    title="host memory can be pinned",
    why="checkpoints go to a card by pinned memory",
    looks_at="a pinned buffer of 64 MiB, in a child",
    level=2,
    needs=("DEEP002",),
)
def pins(m: Machine) -> Finding:
    ran, said = _child(m, PIN)
    if ran.code == 0:
        return ok(say("host memory can be pinned"))
    if ran.code is None:
        return _hung("pin_memory()")
    return fail(
        say("host memory cannot be pinned: {error}", error=said),
        cmd("pin_memory()", said),
        fix="docker run --ulimit memlock=-1 ..." if m.in_container else "ulimit -l unlimited",
    )
