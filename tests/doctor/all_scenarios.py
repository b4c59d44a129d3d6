"""Every scenario, imported and so registered."""

from __future__ import annotations

from tests.doctor import (
    scenarios_cann,
    scenarios_driver,
    scenarios_engines,
    scenarios_nasty,
    scenarios_packages,
    scenarios_service,
    scenarios_site,
    scenarios_store,
)

MODULES = (
    scenarios_cann, scenarios_driver, scenarios_engines, scenarios_nasty, scenarios_packages,
    scenarios_service, scenarios_site, scenarios_store,
)  # fmt: skip
