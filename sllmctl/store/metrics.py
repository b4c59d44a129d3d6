"""Prometheus metrics and `/healthz` over HTTP, where somebody asks for them."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NoAnswer  # the builtin one since Python 3.11
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from sllmctl.errors import ConfigError
from sllmctl.store.protocol import Message

Ask = Callable[[], Message]
"""Returns the store's status; raises `NoAnswer` when the store does not answer."""

REQUEST_DEADLINE_S = 10.0
_POOL_PARTS = ("used", "pinned", "leased", "orphaned", "prefaulted")


class StoreCollector(Collector):
    """The store's status as metrics, taken anew for each scrape."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def describe(self) -> list[Metric]:
        """Nothing beforehand: registering must not ask the store, whose loop is not running yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        status = self._ask()
        pool, counters = status["pool"], status["counters"]
        yield GaugeMetricFamily("sllm_pool_bytes", "Budget of the pool.", value=pool["bytes"])
        parts = GaugeMetricFamily(
            "sllm_pool_part_bytes", "Parts of the pool; they overlap.", labels=["part"]
        )
        for part in _POOL_PARTS:
            parts.add_metric([part], pool[f"{part}_bytes"])
        yield parts
        held_leases = sum(model["leases"] for model in status["models"])
        yield GaugeMetricFamily("sllm_leases", "Leases held.", value=held_leases)
        warm = GaugeMetricFamily(
            "sllm_model_warm_bytes", "Warm bytes of a model.", labels=["model"]
        )
        held: Counter[str] = Counter()
        for model in status["models"]:  # two versions of a checkpoint have one name
            held[model["name"]] += model["warm_bytes"]
        for name, nbytes in held.items():
            warm.add_metric([name], nbytes)
        yield warm
        source = CounterMetricFamily(
            "sllm_bytes", "Bytes of loads, by where they were.", labels=["source"]
        )
        source.add_metric(["disk"], counters["bytes_disk"])
        source.add_metric(["page_cache"], counters["bytes_cache"])
        source.add_metric(["store"], counters["bytes_warm"])
        yield source
        seconds = counters["load_seconds"]
        bounds = zip(map(str, seconds["bounds"]), seconds["counts"], strict=True)
        yield HistogramMetricFamily(
            "sllm_load_seconds",
            "From a request to its last segment, as far as the store takes part.",
            buckets=[*bounds, ("+Inf", seconds["count"])],
            sum_value=seconds["sum"],
        )
        for name, text in (
            ("loads", "Loads and warmings begun."),
            ("evictions", "Segments taken from models."),
            ("errors", "Requests refused and fills that failed."),
        ):
            yield CounterMetricFamily(f"sllm_{name}", text, value=counters[name])


def parse_address(text: str) -> tuple[str, int]:
    """Read ``127.0.0.1:9464`` or ``[::1]:9464``.

    Raises:
        ConfigError: The text is no address with a port.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"`{text}` is not an address", hint="write it like 127.0.0.1:9464")
    return host.strip("[]"), int(port)


class _Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def serve_metrics(address: str, ask: Ask) -> ThreadingHTTPServer:
    """Answer `/metrics` and `/healthz` on a thread of its own until `shutdown()`.

    Raises:
        ConfigError: The address is none, or taken.
    """
    registry = CollectorRegistry()
    registry.register(StoreCollector(ask))

    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_DEADLINE_S  # a thread each: one that says nothing must not stay

        def do_GET(self) -> None:
            if self.path not in ("/metrics", "/healthz"):
                self._answer(404, "text/plain", b"/metrics and /healthz are here\n")
                return
            try:
                body = b"ok\n"
                if self.path == "/metrics":
                    body = generate_latest(registry)
                else:
                    ask()
            except NoAnswer:
                self._answer(503, "text/plain", b"the store does not answer\n")
                return
            kind = CONTENT_TYPE_LATEST if self.path == "/metrics" else "text/plain"
            self._answer(200, kind, body)

        def _answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """A scrape every few seconds is nothing to write down."""

    host, port = parse_address(address)
    try:
        server = (_Server6 if ":" in host else ThreadingHTTPServer)((host, port), Handler)
    except OSError as exc:
        raise ConfigError(f"cannot serve metrics at `{address}`: {exc.strerror or exc}") from exc
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="sllm-metrics", daemon=True).start()
    return server
