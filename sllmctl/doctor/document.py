"""The examination as a document: `sllmctl.doctor/1`, redacted before anybody sees it."""

from __future__ import annotations

from typing import Any

from sllmctl import __version__
from sllmctl.doctor.check import GROUPS, Status
from sllmctl.doctor.examine import Examination, Outcome
from sllmctl.doctor.machine import Machine
from sllmctl.doctor.redact import Redactor

SCHEMA = "sllmctl.doctor/1"
# Variables that say something about the machine's setup; no other one is collected.
ENV_PREFIXES = (
    "ASCEND_", "ATB_", "ASDOPS_", "HCCL_", "LCCL_", "TORCH_", "PYTORCH_", "VLLM_", "SGLANG_",
    "SLLM", "HF_", "MODELSCOPE_", "OMP_",
)  # fmt: skip
ENV_NAMES = (
    "http_proxy", "https_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy", "all_proxy",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "PYTHONPATH", "PATH", "CONDA_PREFIX", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "USE_CANN",
    "GLOO_SOCKET_IFNAME", "LANG", "LC_ALL",
)  # fmt: skip
PACKAGES = (
    "torch", "torch-npu", "torchvision", "torchaudio", "numpy", "transformers", "safetensors",
    "huggingface-hub", "modelscope", "accelerate", "serverless-llm-store", "grpcio", "vllm",
    "vllm-ascend", "sglang", "sgl-kernel-npu", "deep-ep", "triton", "triton-ascend",
)  # fmt: skip


def document(done: Examination, *, started: str, exit_code: int) -> dict[str, Any]:
    """Everything, for a program: every check is in it, in English.

    Args:
        done: The examination.
        started: When it began, as ISO 8601.
        exit_code: What the command returns.
    """
    m = done.machine
    counts = {status.value: done.counts[status] for status in Status}
    whole = {
        "schema": SCHEMA,
        "tool_version": __version__,
        "table_date": m.tables.date,
        "started": started,
        "duration_ms": done.duration_ms,
        "profile": list(m.profiles),
        "host": {
            "arch": m.arch,
            "kernel": m.probe.host.kernel,
            "container": m.in_container,
            "python": m.probe.host.python,
            "glibc": m.probe.host.glibc,
        },
        "facts": facts(m),
        "checks": [_check(outcome) for outcome in done.outcomes],
        "advice": [
            {
                "row": row.name,
                "parts": dict(row.parts),
                "here": list(row.here),
                "commands": list(row.commands),
            }
            for row in done.rows
        ],
        "summary": counts,
        "exit_code": exit_code,
    }
    redacted: dict[str, Any] = Redactor(m.probe.host).document(whole)
    return redacted


def facts(m: Machine) -> dict[str, Any]:
    """What is on the machine, judged or not."""
    return {
        "cann": [{"version": r.version, "source": r.source, "path": r.path} for r in m.cann_roots],
        "driver": m.driver,
        "nnal": [{"version": n.version, "path": n.path} for n in m.nnal],
        "chips": [
            {"npu": c.npu, "name": c.name, "health": c.health, "total_mb": c.total_mb}
            for c in m.smi.cards
        ],
        "packages": {name: v for name in PACKAGES if (v := m.dists.version(name))},
        "environment": [
            {"name": name, "value": value}
            for name, value in sorted(m.env.items())
            if name in ENV_NAMES or name.startswith(ENV_PREFIXES)
        ],
    }


def _check(outcome: Outcome) -> dict[str, Any]:
    check, finding = outcome.check, outcome.finding
    return {
        "id": check.id,
        "group": GROUPS[check.group],
        "title": check.title,
        "severity": check.severity.value,
        "status": finding.status.value,
        "summary": str(finding.summary),
        "detail": [str(text) for text in finding.more],
        "why": check.why,
        "evidence": [{"kind": e.kind, "name": e.name, "value": e.value} for e in finding.evidence],
        "fix": {
            "command": finding.fix,
            "advice": str(finding.advice) if finding.advice else "",
            "auto": finding.action,
        },
        "depends_on": list(check.needs),
        "skipped_because": str(finding.summary) if finding.status is Status.SKIP else "",
        "duration_ms": outcome.duration_ms,
    }
