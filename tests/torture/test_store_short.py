"""The short form of the store's torture; `make torture` runs the long one."""

from __future__ import annotations

from pathlib import Path

from tests.torture import store


def test_clients_killed_at_any_instant_leave_exact_accounts(tmp_path: Path) -> None:
    assert "6 clients killed" in store.kill_clients(tmp_path, 6)


def test_loads_are_right_when_the_store_is_killed_at_any_instant(tmp_path: Path) -> None:
    assert "killed 3 times" in store.kill_stores(tmp_path, 3)


def test_a_crowd_in_a_small_pool_gets_every_byte_right(tmp_path: Path) -> None:
    assert "6 clients" in store.churn(tmp_path, 8, clients=6)
