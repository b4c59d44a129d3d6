"""DRV: the cards, as npu-smi reports them."""

from __future__ import annotations

from sllmctl.doctor.check import (
    Finding,
    Status,
    check,
    cmd,
    fail,
    file,
    info,
    ok,
    say,
    skip,
    warn,
    worst,
)
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.npu_smi import DCMI_CODES

_HEALTH = {
    "OK": None, "Alarm": fail, "Critical": fail, "Warning": warn, "UNKNOWN": info, "": info,
}  # fmt: skip


@check(
    "DRV009",
    title="npu-smi answers, and the cards are healthy",
    why="a card in Alarm or Critical fails in the middle of a load",
    looks_at="`npu-smi info` (10 s at most): the table, its Health column, and its rows against "
    "/dev/davinci*",
    level=1,
    needs=("DRV003", "DRV010"),
)
def smi_healthy(m: Machine) -> Finding:
    ran = m.smi_ran
    assert ran is not None
    if ran.code is None:
        return warn(
            say("npu-smi does not answer within 10 s"),
            cmd("npu-smi info", "no answer"),
            advice=say("a device hangs: look into `dmesg`, then reset it or reboot"),
        )
    if ran.code == 127:
        tool = "/usr/local/bin/npu-smi"
        return warn(
            say("npu-smi is not here"),
            cmd("npu-smi info", "not found"),
            fix=f"docker run -v {tool}:{tool} -v /usr/local/dcmi:/usr/local/dcmi ..."
            if m.in_container
            else "",
            # Outside of PATH it was looked for, too: it comes with the driver.
            advice=None if m.in_container else say("install the driver again"),
        )
    if not m.smi.cards:
        first = (ran.err or ran.out).strip().splitlines()[:1]
        return warn(
            say("npu-smi lists no card"),
            cmd("npu-smi info", first[0] if first else f"exit {ran.code}"),
            fix="npu-smi info",
        )
    found: list[Finding | None] = []
    for card in m.smi.cards:
        place = cmd("npu-smi info", f"NPU {card.npu} {card.name}: {card.health}")
        # A word that is new, or in another language, is no verdict.
        made = _HEALTH.get(card.health, warn)
        if made is not None:
            found.append(
                made(
                    say("NPU {npu} reports {health}", npu=card.npu, health=card.health or "-"),
                    place,
                    fix=f"npu-smi info -t health -i {card.npu}",
                )
            )
    count = len(m.smi.cards)
    if m.cards and count != len(m.cards):
        found.append(
            info(
                say("npu-smi lists {count} chips, /dev has {nodes}",
                    count=count, nodes=len(m.cards)),
                cmd("npu-smi info", f"{count} chips"),
                file("/dev", f"davinci{','.join(map(str, m.cards))}"),
            )
        )  # fmt: skip
    return worst(
        found,
        ok(say("{count} chips, all healthy", count=count), cmd("npu-smi info", m.smi.version)),
    )


@check(
    "DRV010",
    title="no other container holds the cards",
    why="a container without privileges takes a card for itself alone",
    looks_at="the error code of `npu-smi info` (ret is -8020, -8005 ...)",
    level=1,
    needs=("DRV003",),
)
def cards_free(m: Machine) -> Finding:
    code = m.smi.code
    if code is None:
        return ok(say("npu-smi reports no error"))
    seen = cmd("npu-smi info", f"ret is {code}: {DCMI_CODES.get(code, 'unknown')}")
    if code == -8020:
        return fail(
            say("another container or process holds this card (-8020)"),
            seen,
            fix="docker ps  # on the host: stop the one that has the card, or map another card",
        )
    if code == -8005:
        return fail(
            say("the driver cannot be reached (-8005)"),
            seen,
            advice=say(
                "map all device nodes; do not mix privileged and other containers on a card; "
                "reboot after a firmware upgrade"
            ),
        )
    return fail(
        say("npu-smi fails with {code}: {meaning}", code=code, meaning=DCMI_CODES.get(code, "?")),
        seen,
        fix="npu-smi info",
    )


@check(
    "DRV011",
    title="the chips are of a supported generation",
    why="engines support Atlas A2 and A3; first-generation 910 and 310B chips are not",
    looks_at="the name that npu-smi prints, else the PCI device id (910B3 is A2, not A3)",
    needs=("DRV001",),
)
def chip_supported(m: Machine) -> Finding:
    kind = m.generation
    names = ", ".join(sorted({card.name for card in m.smi.cards})) or kind
    seen = cmd("npu-smi info", names) if m.smi.cards else file("/sys/bus/pci/devices", names)
    engines = {"vllm", "sglang"} & set(m.profiles)
    if not kind:
        return info(say("this chip is not known here: {names}", names=names or "?"), seen)
    if engines and kind in ("A1", "310B"):
        return fail(
            say("{names} is not supported by vLLM and SGLang on Ascend", names=names),
            seen,
            advice=say("use a machine with Atlas A2 or A3 cards"),
        )
    if "sglang" in engines and kind == "310P":
        return fail(
            say("{names} is not supported by SGLang on Ascend", names=names),
            seen,
            advice=say("use a machine with Atlas A2 or A3 cards"),
        )
    if kind == "310P":
        return warn(
            say("{names} has no bfloat16", names=names),
            seen,
            advice=say("convert and serve in float16"),
        )
    return ok(say("{names} ({kind})", names=names, kind=kind), seen)


@check(
    "DRV012",
    title="device memory is free",
    why="memory that others use on a card is not available to the model",
    looks_at="the memory column and the process list of `npu-smi info`; with --model, the bytes "
    "of its shards",
    severity=Status.WARN,
    level=1,
    needs=("DRV009",),
)
def memory_free(m: Machine) -> Finding:
    cards = [c for c in m.smi.cards if c.total_mb]
    if not cards:
        return skip(say("npu-smi says nothing about memory"))
    free_mb = sum((c.total_mb or 0) - (c.used_mb or 0) for c in cards)
    need_mb = m.model_bytes >> 20
    seen = cmd("npu-smi info", f"{free_mb} MB free on {len(cards)} chips")
    if need_mb > free_mb:
        return warn(
            say("the model needs {need} MB, all chips together have {free} MB free",
                need=need_mb, free=free_mb),
            seen,
            fix="npu-smi info  # stop what holds the cards",
        )  # fmt: skip
    busy = [c for c in cards if (c.used_mb or 0) > 0.2 * (c.total_mb or 0)]
    if busy or m.smi.processes:
        npus = sorted({c.npu for c in busy} | {p[0] for p in m.smi.processes})
        return info(
            say("NPU {npus} is in use", npus=", ".join(map(str, npus))),
            *(cmd("npu-smi info", f"NPU {c.npu}: {c.used_mb} of {c.total_mb} MB") for c in busy),
            *(
                cmd("npu-smi info", f"process {p[1]} ({p[2]}) on NPU {p[0]}")
                for p in m.smi.processes
            ),
        )
    return ok(say("{free} MB of device memory are free", free=free_mb), seen)
