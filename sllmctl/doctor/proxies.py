"""Whether a client talks to this very machine through a proxy: pure functions of the environment.

Measured with grpcio 1.49.1 and 1.85.1 against a proxy socket; see tests/doctor/test_proxies.py.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

NEW_GRPC = (1, 80)


def grpc_proxied(env: Mapping[str, str], host: str, *, new: bool = False) -> bool:
    """Whether gRPC's C core would send a call to a host through a proxy.

    It reads lower-case variables alone, and matches host names by their end. The first variable
    that is set counts, even an empty one.

    Args:
        env: The environment of the client.
        host: As the target is written: `127.0.0.1` or `localhost`.
        new: A release that allows blanks and networks in no_proxy.
    """
    proxy = next((env[n] for n in ("grpc_proxy", "https_proxy", "http_proxy") if n in env), "")
    if not proxy.lower().startswith("http://"):
        return False
    entries = env.get("no_grpc_proxy", env.get("no_proxy", "")).split(",")
    for entry in entries:
        if new:
            entry = entry.strip()
            if "/" in entry and _in_network(host, entry):
                return False
        if entry and host.lower().endswith(entry.lower()):
            return False
    return True


def http_proxied(env: Mapping[str, str], host: str) -> bool:
    """Whether requests, httpx and urllib would: both cases count, the lower one first."""
    proxy = next(
        (v for n in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if (v := env.get(n))), ""
    )
    if not proxy:
        return False
    listed = env.get("no_proxy") or env.get("NO_PROXY") or ""
    if listed.strip() == "*":  # beside other entries most clients do not know it
        return False
    for entry in (part.strip().lower() for part in listed.split(",")):
        if entry and host.lower().endswith(entry.lstrip(".")):
            return False
        if "/" in entry and _in_network(host, entry):
            return False
    return True


def _in_network(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
