"""NET: proxies between two processes of one machine, ports, and the way out."""

from __future__ import annotations

import re
import shlex

from sllmctl.doctor.check import (
    Evidence,
    Finding,
    Status,
    check,
    cmd,
    env,
    fail,
    file,
    info,
    ok,
    say,
    warn,
)
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.proxies import NEW_GRPC, grpc_proxied, http_proxied
from sllmctl.doctor.versions import release

LOOPBACK = ("127.0.0.1", "localhost")
PORTS = {"store": (8073, "sllm-store"), "vllm": (8000, "vLLM"), "sglang": (30000, "SGLang")}
_PROXY_NAMES = re.compile(r"^(no_|http_|https_|grpc_|all_|no_grpc_)proxy$", re.IGNORECASE)


def bypass(m: Machine) -> str:
    """The export that keeps loopback off the proxy, with what is listed already."""
    old = m.env.get("no_proxy") or m.env.get("NO_PROXY") or ""
    entries = [e.strip() for e in old.split(",") if e.strip() and e.strip() != "*"]
    value = shlex.quote(",".join(dict.fromkeys([*entries, "localhost", "127.0.0.1", "::1"])))
    return f"export no_proxy={value} NO_PROXY={value}"


def _seen(m: Machine) -> list[Evidence]:
    return [env(name, value) for name, value in sorted(m.env.items()) if _PROXY_NAMES.match(name)]


@check(
    "NET001",
    title="gRPC to this machine does not go through a proxy",
    why="the client of sllm-store dials 127.0.0.1:8073 by gRPC, which reads lower-case "
    "no_proxy alone",
    looks_at="grpc_proxy, https_proxy, http_proxy, no_grpc_proxy and no_proxy, by the rules of the "
    "installed grpcio",
    profiles="base store",
)
def grpc(m: Machine) -> Finding:
    new = release(m.dists.version("grpcio")) >= NEW_GRPC
    through = [host for host in LOOPBACK if grpc_proxied(m.env, host, new=new)]
    if not through:
        return ok(say("gRPC reaches this machine directly"))
    made = fail if "store" in m.profiles else warn
    return made(
        say("gRPC to {hosts} goes through a proxy", hosts=", ".join(through)),
        *_seen(m),
        fix=bypass(m),
        action="env",
    )


@check(
    "NET002",
    title="HTTP to this machine does not go through a proxy",
    why="curl, requests and the openai client would ask the proxy for a server on localhost",
    looks_at="http_proxy, all_proxy and no_proxy in both cases",
    severity=Status.WARN,
)
def http(m: Machine) -> Finding:
    through = [host for host in LOOPBACK if http_proxied(m.env, host)]
    if not through:
        return ok(say("HTTP reaches this machine directly"))
    return warn(
        say("HTTP to {hosts} goes through a proxy", hosts=", ".join(through)),
        *_seen(m),
        fix=bypass(m),
        action="env",
    )


@check(
    "NET003",
    title="the ports of the servers are free, or taken by them",
    why="a server that finds its port taken ends at once",
    looks_at="listeners on 8073 (sllm-store), 8000 (vLLM) and 30000 (SGLang) in /proc/net/tcp",
    severity=Status.INFO,
    profiles="store vllm sglang",
)
def ports(m: Machine) -> Finding:
    listening = _listening(m)
    taken = [
        (port, name) for p, (port, name) in PORTS.items() if p in m.profiles and port in listening
    ]
    if not taken:
        return ok(say("the ports of the servers are free"))
    names = ", ".join(f"{port} ({name})" for port, name in taken)
    return info(
        say("somebody listens already on {names}", names=names),
        *(file("/proc/net/tcp", f"port {port}") for port, _ in taken),
    )


def _listening(m: Machine) -> set[int]:
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (m.probe.read_text(name, 4 << 20) or "").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == "0A":
                port = fields[1].rpartition(":")[2]
                if re.fullmatch(r"[0-9A-Fa-f]{1,4}", port):
                    found.add(int(port, 16))
    return found


@check(
    "NET004",
    title="a model hub can be reached",
    why="`convert` downloads from it",
    looks_at="a request to the hub's endpoint, through whatever proxy is set",
    severity=Status.INFO,
    level=1,
    profiles="base convert",
    network=True,
)
def hub(m: Machine) -> Finding:
    endpoint = m.env.get("HF_ENDPOINT") or "https://huggingface.co"
    failed = []
    for url in dict.fromkeys([endpoint, "https://modelscope.cn"]):
        status, body = m.probe.get(url, direct=False)
        if 200 <= status < 500:
            return ok(say("{url} answers", url=url), cmd(f"GET {url}", status))
        failed.append(cmd(f"GET {url}", body[:120] or status))
    return info(
        say("no model hub can be reached from here"),
        *failed,
        fix="export HF_ENDPOINT=https://hf-mirror.com",
    )


@check(
    "NET005",
    title="the ports of HCCL are kept free",
    why="cards talk over ports from 60000 on; a client that got one by chance breaks the job",
    looks_at="listeners on 60000-60031, and whether ip_local_port_range hands those ports out",
    severity=Status.WARN,
    profiles="vllm sglang",
)
def hccl(m: Machine) -> Finding:
    if (
        len(m.cards) < 2
        or m.env.get("HCCL_IF_BASE_PORT")
        or m.env.get("HCCL_HOST_SOCKET_PORT_RANGE")
    ):
        return ok(say("HCCL has ports of its own, or needs none"))
    taken = sorted(port for port in _listening(m) if 60000 <= port <= 60031)
    if taken:
        return warn(
            say("ports that HCCL needs are taken: {ports}", ports=", ".join(map(str, taken))),
            file("/proc/net/tcp", taken),
            fix="export HCCL_IF_BASE_PORT=50000",
        )
    path = "/proc/sys/net/ipv4/ip_local_port_range"
    span = re.findall(r"\d{1,5}", m.probe.read_text(path) or "")
    kept = m.probe.read_text("/proc/sys/net/ipv4/ip_local_reserved_ports") or ""
    if len(span) == 2 and int(span[0]) <= 60031 and int(span[1]) >= 60000 and "60000" not in kept:
        return info(
            say("the system may hand out ports that HCCL needs (60000-60031)"),
            file(path, "-".join(span)),
            fix="sudo sysctl -w net.ipv4.ip_local_reserved_ports=60000-60031",
        )
    return ok(say("the ports of HCCL are free"))
