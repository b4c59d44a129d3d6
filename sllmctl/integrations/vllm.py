"""vLLM's entry point ``vllm.general_plugins``: makes ``--load-format sllm`` known."""

from __future__ import annotations

LOAD_FORMATS = ("sllm", "serverless_llm")
"""The second is what vLLM patched for sllm-store calls its loader."""


def register() -> None:
    """Register our loader with vLLM 0.10.1 or later; opens nothing, and may be called again.

    vLLM calls it in its front end, in the engine, in every worker and in the process that looks at
    models.
    """
    try:
        from vllm.model_executor.model_loader import register_model_loader
    except ImportError as exc:
        # Without load format there is nothing to break: whoever asks for it is told by vLLM.
        import logging

        logging.getLogger("vllm.sllmctl").warning(
            "sllmctl's loader needs vLLM 0.10.1 or later: %s", exc
        )
        return
    from vllm.model_executor import model_loader

    from sllmctl.integrations.vllm_loader import SllmLoader

    known = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    for name in LOAD_FORMATS:
        if known.get(name) is not SllmLoader:
            register_model_loader(name)(SllmLoader)
