"""Every check, imported and put in the order in which people read them."""

from __future__ import annotations

from sllmctl.doctor.check import CHECKS, GROUPS
from sllmctl.doctor.checks import (
    cann,
    cards,
    container,
    deep,
    disk,
    driver,
    environment,
    hub,
    memory,
    network,
    nnal,
    packages,
    python,
    server,
    sglang,
    sllm_store,
    store,
    vllm,
)

MODULES = (
    driver, cards, cann, nnal, environment, python, packages, store, sllm_store, vllm, sglang,
    network, hub, memory, disk, container, server, deep,
)  # fmt: skip

_order = list(GROUPS)
for _id in sorted(CHECKS, key=lambda name: (_order.index(CHECKS[name].group), name)):
    CHECKS[_id] = CHECKS.pop(_id)
