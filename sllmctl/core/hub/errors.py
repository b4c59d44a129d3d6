"""What to tell a person when a hub does not deliver."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

from sllmctl.core.hub.cache import cache_root, cache_setting
from sllmctl.core.hub.process import ClientError
from sllmctl.core.units import format_size
from sllmctl.errors import HubError

TITLES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
_TOKENS = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}
_LOGINS = {
    "huggingface": (("hf", "hf auth login"), ("huggingface-cli", "huggingface-cli login")),
    "modelscope": (("ms", "ms login"), ("modelscope", "modelscope login")),
}
_PACKAGES = {"huggingface": "huggingface_hub", "modelscope": "modelscope-hub"}


def endpoint(hub: str) -> str:
    """Return the address that a hub's client will ask."""
    env = os.environ
    if hub == "modelscope":
        address = env.get("MODELSCOPE_ENDPOINT") or env.get("MODELSCOPE_DOMAIN", "").strip()
        address = address or "https://modelscope.cn"
        return (address if "://" in address else f"https://{address}").rstrip("/")
    return env.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def proxy_in_force(address: str) -> tuple[str, str] | None:
    """Find the proxy for an address: the variable that names it, and its value without secrets."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if proxy_bypass(f"{host}:{parts.port}" if parts.port else host):
        return None
    for scheme in (parts.scheme, "all"):
        for variable in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
            if os.environ.get(variable):
                return variable, redact(os.environ[variable])
    return None


def redact(text: str) -> str:
    """Take passwords, tokens and the queries of signed addresses out of a message."""
    for variable in _TOKENS.values():
        secret = os.environ.get(variable, "").strip()
        if secret:
            text = text.replace(secret, "***")
    text = re.sub(r"(?i)(bearer\s+)[^\s'\"]+", r"\1***", text)
    text = re.sub(r"(://)[^/@\s]+@", r"\1***@", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)


def unreachable_both(name: str, first: ClientError, second: ClientError) -> HubError:
    """Return the error for a model that neither hub could be asked for."""
    return HubError(
        f"no hub can be reached for `{name}`: {_where(first)}; {_where(second)}",
        hint="check the network and the proxy settings, set HF_ENDPOINT or MODELSCOPE_ENDPOINT"
        " to a mirror, or give a local directory",
    )


def to_error(name: str, error: ClientError, revision: str | None = None) -> HubError:
    """Return the error that a client's failure means to a person."""
    hub, title, detail = error.hub, TITLES[error.hub], redact(error.detail)
    page, login = f"{endpoint(hub)}/{name}", _login_hint(hub)
    proxy = proxy_in_force(endpoint(hub))
    match error.reason:
        case "unreachable" | "proxy" | "tls" | "server" if error.planned:
            return HubError(
                f"the download of `{name}` from {title} broke off at"
                f" {format_size(error.done_bytes)} of {format_size(error.total_bytes)}: {detail}",
                hint="run the same command again: it goes on where it stopped",
            )
        case "unreachable":
            return HubError(f"{_where(error)}", hint=_reach_hint(hub, proxy))
        case "proxy":
            through = f"the proxy {proxy[1]} ({proxy[0]})" if proxy else "a proxy"
            return HubError(
                f"{through} refused the connection to {endpoint(hub)}: {detail}",
                hint=_reach_hint(hub, proxy),
            )
        case "tls":
            return HubError(
                f"no secure connection to {endpoint(hub)}: {detail}",
                hint="where a proxy re-signs connections, set SSL_CERT_FILE and REQUESTS_CA_BUNDLE"
                " to its certificate; else check the address",
            )
        case "endpoint":
            return HubError(
                f"{endpoint(hub)} is not the address of a hub: {detail}",
                hint="write it like https://hf-mirror.com",
            )
        case "gated":
            return HubError(
                f"`{name}` is gated on {title}, and access is not granted",
                hint=f"ask for access at {page}, then {login}",
            )
        case "not_public":
            return HubError(
                f"{title} has no public model `{name}`",
                hint=f"check the name at {page}; for a private or gated model {login};"
                f" or use {_other_hub(hub)}",
            )
        case "not_found":
            return HubError(
                f"{title} has no model `{name}`"
                + (f" with a revision `{revision}`" if revision else ""),
                hint=f"check the name at {page}, or use {_other_hub(hub)}",
            )
        case "no_revision":
            return HubError(
                f"`{name}` has no revision `{revision}` on {title}",
                hint=f"see its branches and tags at {page}",
            )
        case "no_access":
            return HubError(f"{title} refused the access token (401) for `{name}`", hint=login)
        case "forbidden":
            return HubError(
                f"{title} refused access to `{name}` (403): {detail}",
                hint=f"ask for access at {page}, then {login}",
            )
        case "server":
            return HubError(
                f"{title} at {endpoint(hub)} cannot serve `{name}` at the moment: {detail}",
                hint="try again in a few minutes; a download that had begun goes on",
            )
        case "disk_full" | "cache":
            return HubError(
                f"cannot write to the download cache {cache_root(hub)}: {detail}",
                hint=f"set {cache_setting(hub)} to a directory with room that you may write to",
            )
        case "no_client":
            return HubError(
                f"the {title} client cannot be loaded: {detail}",
                hint=f"pip install --upgrade {_PACKAGES[hub]}",
            )
        case "died":
            return HubError(
                f"the {title} client stopped unexpectedly ({detail})",
                hint="run the same command again: it goes on where it stopped",
            )
        case _:
            return HubError(f"the download of `{name}` from {title} failed: {detail}")


def not_enough_room(hub: str, needed_bytes: int, free_bytes: int) -> HubError:
    """Return the error for a disk that cannot take the download."""
    return HubError(
        f"the download needs {format_size(needed_bytes)} and {cache_root(hub)}"
        f" has {format_size(free_bytes)} free",
        hint=f"free some space, or set {cache_setting(hub)} to a directory on a larger disk",
    )


def _where(error: ClientError) -> str:
    """Say which hub could not be reached, how, and through which proxy."""
    address = endpoint(error.hub)
    proxy = proxy_in_force(address)
    through = f" through the proxy {proxy[1]} ({proxy[0]})" if proxy else ""
    return f"cannot reach {TITLES[error.hub]} at {address}{through}: {redact(error.detail)}"


def _reach_hint(hub: str, proxy: tuple[str, str] | None) -> str:
    if proxy is not None:
        host = urlsplit(endpoint(hub)).hostname
        return f"correct {proxy[0]}, or add {host} to NO_PROXY; or use {_other_hub(hub)}"
    mirror = "MODELSCOPE_ENDPOINT" if hub == "modelscope" else "HF_ENDPOINT"
    return f"set {mirror} to a mirror that you can reach, or use {_other_hub(hub)}"


def _other_hub(hub: str) -> str:
    return "--hub huggingface" if hub == "modelscope" else "--hub modelscope"


def _login_hint(hub: str) -> str:
    beside = str(Path(sys.executable).parent)
    for program, command in _LOGINS[hub]:
        if shutil.which(program) or shutil.which(program, path=beside):
            return f"set {_TOKENS[hub]}, or run `{command}`"
    return f"set {_TOKENS[hub]}"
