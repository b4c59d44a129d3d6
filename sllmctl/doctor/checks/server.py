"""SRV: a server that is up, seen as its clients see it."""

from __future__ import annotations

import urllib.parse

from sllmctl.doctor.check import Finding, check, cmd, fail, ok, say, skip
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.probe import parse_json

_LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
_USUAL = (30000, 8000)


def _place(m: Machine) -> tuple[str, int, str] | Finding:
    """Host, port and address of --base-url, or why nothing can be said of it."""
    url = m.options.base_url
    if not url:
        return skip(say("--base-url was not given"))
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        return fail(say("--base-url is not an address"), cmd(url, "not a URL"),
                    advice=say("it looks like http://localhost:8000/v1"))  # fmt: skip
    if host not in _LOCAL and not m.options.network:
        return skip(say("leaves this machine: only with --net"))
    return host, port, url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"


@check(
    "SRV001",
    title="a server listens at the address that clients use",
    why="SGLang listens on 30000 and vLLM on 8000, unless told; examples often say 3000",
    looks_at="a TCP connection to --base-url, and to the usual ports",
    level=1,
    profiles="base convert",
)
def listens(m: Machine) -> Finding:
    place = _place(m)
    if isinstance(place, Finding):
        return place
    host, port, url = place
    if m.probe.connects(host, port):
        return ok(say("port {port} answers", port=port), cmd(url, "connected"))
    other = [p for p in _USUAL if p != port and m.probe.connects(host, p)]
    if other:
        parts = urllib.parse.urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        name = f"[{host}]" if ":" in host else host
        right = parts._replace(netloc=f"{user}{at}{name}:{other[0]}").geturl()
        return fail(
            say("nothing listens on port {port}, but something does on {other}",
                port=port, other=other[0]),
            cmd(url, "refused"),
            fix=f"export OPENAI_BASE_URL={right}",
        )  # fmt: skip
    return fail(
        say("nothing listens on port {port}", port=port),
        cmd(url, "refused"),
        advice=say("start the server, or give its --port here"),
    )


@check(
    "SRV002",
    title="the server knows the model by the name that clients use",
    why="without --served-model-name the name is the path that the server was given",
    looks_at="GET /v1/models of --base-url, against --served-model",
    level=1,
    profiles="base convert",
    needs=("SRV001",),
)
def served(m: Machine) -> Finding:
    place = _place(m)
    if isinstance(place, Finding):
        return place
    _, _, url = place
    wanted = m.options.served_model
    if not wanted:
        return skip(say("--served-model was not given"))
    address = f"{url}/models" if url.endswith("/v1") else f"{url}/v1/models"
    status, body = m.probe.get(address)
    try:
        names = [str(entry["id"]) for entry in parse_json(body)["data"]] if status == 200 else []
    except (LookupError, TypeError):
        names = []
    if not names:
        return skip(say("the server does not list its models (HTTP {status})", status=status))
    if wanted in names:
        return ok(say("the server knows {name}", name=wanted), cmd(address, ", ".join(names)))
    listed = ", ".join(names)
    return fail(
        say("the server has no model {wanted}; it has {names}", wanted=wanted, names=listed),
        cmd(address, listed),
        advice=say("use that name, or start the server with --served-model-name {name}",
                   name=wanted),
    )  # fmt: skip
