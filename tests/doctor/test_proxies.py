"""The table of what goes through a proxy, as measured with grpcio 1.49.1 and 1.85.1."""

from __future__ import annotations

import pytest

from sllmctl.doctor.proxies import grpc_proxied, http_proxied

P = "http://proxy:3128"
# environment, target, whether the old and the new grpcio went through the proxy
GRPC = [
    ({}, "127.0.0.1", False, False),
    ({"HTTP_PROXY": P}, "127.0.0.1", False, False),
    ({"HTTPS_PROXY": P}, "127.0.0.1", False, False),
    ({"http_proxy": P}, "127.0.0.1", True, True),
    ({"https_proxy": P}, "127.0.0.1", True, True),
    ({"http_proxy": P, "no_proxy": "127.0.0.1"}, "127.0.0.1", False, False),
    ({"http_proxy": P, "no_proxy": "localhost"}, "127.0.0.1", True, True),
    ({"http_proxy": P, "no_proxy": "localhost"}, "localhost", False, False),
    ({"http_proxy": P, "no_proxy": "127.0.0.1"}, "localhost", True, True),
    ({"http_proxy": P, "NO_PROXY": "localhost,127.0.0.1"}, "127.0.0.1", True, True),
    ({"http_proxy": P, "no_grpc_proxy": "foo", "no_proxy": "127.0.0.1"}, "127.0.0.1", True, True),
    ({"http_proxy": P, "no_proxy": "127.0.0.0/8"}, "127.0.0.1", True, False),
    ({"http_proxy": P, "no_proxy": "*"}, "127.0.0.1", True, True),
    ({"http_proxy": P, "no_proxy": "localhost, 127.0.0.1"}, "127.0.0.1", True, False),
    ({"grpc_proxy": "", "http_proxy": P}, "127.0.0.1", False, False),
    ({"https_proxy": "", "http_proxy": P}, "127.0.0.1", False, False),
    ({"http_proxy": "socks5://proxy:1080"}, "127.0.0.1", False, False),
]


@pytest.mark.parametrize(("environment", "host", "old", "new"), GRPC)
def test_grpc_goes_where_it_was_seen_to_go(
    environment: dict[str, str], host: str, old: bool, new: bool
) -> None:
    assert grpc_proxied(environment, host) is old
    assert grpc_proxied(environment, host, new=True) is new


@pytest.mark.parametrize(
    ("environment", "through"),
    [
        ({}, False),
        ({"HTTP_PROXY": P}, True),
        ({"http_proxy": P, "NO_PROXY": "localhost, 127.0.0.1"}, False),
        ({"http_proxy": P, "no_proxy": "*"}, False),
        ({"http_proxy": P, "no_proxy": "intern,*"}, True),
        ({"http_proxy": P, "no_proxy": "127.0.0.1:8000"}, True),
        ({"http_proxy": P, "no_proxy": "127.0.0.0/8"}, False),
        ({"ALL_PROXY": P, "no_proxy": ".example"}, True),
    ],
)
def test_http_clients_read_both_cases(environment: dict[str, str], through: bool) -> None:
    assert http_proxied(environment, "127.0.0.1") is through
