"""Every check, imported and put in the order in which people read them."""

from __future__ import annotations

from sllmctl.doctor.check import CHECKS, GROUPS
from sllmctl.doctor.checks import cann, driver, environment, packages, python

MODULES = (driver, cann, environment, python, packages)

_order = list(GROUPS)
for _id in sorted(CHECKS, key=lambda name: (_order.index(CHECKS[name].group), name)):
    CHECKS[_id] = CHECKS.pop(_id)
