"""A Qwen3-shaped checkpoint of any size, with random weights, written at the speed of the disk.

It has real shapes (a vocabulary of 151,936, wide layers) and weights that a forward pass survives,
so that a load can be measured and proven without a download.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sllmctl.core.units import format_size, parse_size
from sllmctl.errors import ConfigError

VOCABULARY = 151_936
HEAD_DIM = 128
BLOCK_BYTES = 64 * 2**20
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WIDTHS = (4096, 2048, 1024, 512, 256, 128)
# Upper bytes of bfloat16 values that are spread as trained weights are (normally, by 0.02), and how
# many in 128 have each. The byte holds the sign and all of the exponent but its last bit.
_WEIGHT_EXPONENTS = ((0x39, 2), (0x3A, 7), (0x3B, 29), (0x3C, 75), (0x3D, 15))


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen3 decoder with tied embeddings."""

    hidden: int
    layers: int

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return 3 * self.hidden

    @property
    def heads(self) -> int:
        """Attention heads."""
        return max(2, self.hidden // HEAD_DIM)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return max(1, self.heads // 2)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order of the layers. All are bfloat16."""
        hidden, query, key = self.hidden, self.heads * HEAD_DIM, self.kv_heads * HEAD_DIM
        yield "model.embed_tokens.weight", (VOCABULARY, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            yield prefix + "self_attn.q_proj.weight", (query, hidden)
            yield prefix + "self_attn.k_proj.weight", (key, hidden)
            yield prefix + "self_attn.v_proj.weight", (key, hidden)
            yield prefix + "self_attn.o_proj.weight", (hidden, query)
            yield prefix + "self_attn.q_norm.weight", (HEAD_DIM,)
            yield prefix + "self_attn.k_norm.weight", (HEAD_DIM,)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.intermediate, hidden)
            yield prefix + "mlp.up_proj.weight", (self.intermediate, hidden)
            yield prefix + "mlp.down_proj.weight", (hidden, self.intermediate)
        yield "model.norm.weight", (hidden,)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_tensor_bytes(shape) for _, shape in self.tensors())

    @classmethod
    def of(cls, size_bytes: int) -> Shape:
        """The widest shape of about a size whose embedding takes at most half of it.

        Raises:
            ConfigError: The vocabulary alone would not fit.
        """
        for hidden in _WIDTHS:
            if VOCABULARY * hidden * 2 <= size_bytes // 2:
                rest = size_bytes - cls(hidden, 0).nbytes()
                layer = cls(hidden, 1).nbytes() - cls(hidden, 0).nbytes()
                return cls(hidden, max(1, round(rest / layer)))
        smallest = format_size(2 * VOCABULARY * _WIDTHS[-1] * 2)
        raise ConfigError(
            f"{format_size(size_bytes)} is too small for a model with a vocabulary of {VOCABULARY}",
            hint=f"ask for {smallest} or more",
        )


def make_qwen3(
    path: Path, size_bytes: int, *, max_shard_bytes: int = 4 * 10**9, seed: int = 0
) -> int:
    """Write a Qwen3-shaped checkpoint with config, tokenizer and random bfloat16 weights.

    The same arguments give the same bytes, and no two tensors of a shape are equal. Memory stays
    below 200 MB whatever the size.

    Args:
        path: Directory to fill; made where it is missing.
        size_bytes: Size of the weights to come near to.
        max_shard_bytes: Upper bound of a shard, unless one tensor alone is larger.
        seed: Another seed gives other weights.

    Returns:
        Bytes of all tensors.

    Raises:
        ConfigError: The size is too small for the vocabulary.
    """
    shape = Shape.of(size_bytes)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", _config(shape))
    ids = {"eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 3}
    _write_json(path / "generation_config.json", ids)
    _write_tokenizer(path)
    shards = _split(shape, max_shard_bytes)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    source = _Weights(seed)
    for name, tensors in zip(names, shards, strict=True):
        _write_shard(path / name, tensors, source)
    if len(shards) > 1:
        weight_map = {t: name for name, ts in zip(names, shards, strict=True) for t, _ in ts}
        index = {"metadata": {"total_size": shape.nbytes()}, "weight_map": weight_map}
        _write_json(path / "model.safetensors.index.json", index)
    return shape.nbytes()


class _Weights:
    """Random bfloat16 values: a block of weights and one of norms, read from ever new places."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        half = BLOCK_BYTES // 2
        exponents = bytes(b for b, count in _WEIGHT_EXPONENTS for _ in range(count))
        signed = bytes(exponents[i & 127] | (i & 128) for i in range(256))
        weights = bytearray(BLOCK_BYTES)
        weights[0::2] = rng.randbytes(half)
        weights[1::2] = rng.randbytes(half).translate(signed)
        norms = bytearray(2**20)
        norms[0::2] = rng.randbytes(2**19).translate(bytes(0x80 | i & 15 for i in range(256)))
        norms[1::2] = b"\x3f" * 2**19  # 1.0 to 1.12
        self._weights, self._norms = memoryview(weights), memoryview(norms)
        self._count = 0

    def pieces(self, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The bytes of the next tensor, in pieces of one block at most."""
        block = self._weights if len(shape) > 1 else self._norms
        # An odd number of values a step, in a block of 2^n values: no start comes twice.
        self._count += 1
        start = self._count * 2 * 104_729 % len(block)
        left = _tensor_bytes(shape)
        while left:
            piece = block[start : start + left]
            yield piece
            left -= len(piece)
            start = 0


def _tensor_bytes(shape: tuple[int, ...]) -> int:
    count = 2
    for size in shape:
        count *= size
    return count


def _split(shape: Shape, max_shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dims in shape.tensors():
        nbytes = _tensor_bytes(dims)
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, dims))
        filled += nbytes
    return shards


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], source: _Weights) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + _tensor_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            for piece in source.pieces(shape):
                file.write(piece)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": VOCABULARY - 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 40_960,
        "max_window_layers": shape.layers,
        "model_type": "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": VOCABULARY - 3,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }


def _write_tokenizer(path: Path) -> None:
    """Write a tokenizer: 256 bytes to cut text into, then made-up words to answer with."""
    vocabulary = [*_byte_alphabet(), *map(_word, range(VOCABULARY - 256 - len(SPECIAL_TOKENS)))]
    first_special = len(vocabulary)
    added = [
        {"id": first_special + i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(vocabulary)}, "merges": []},
    }
    _write_json(path / "tokenizer.json", tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 40_960,
    }
    _write_json(path / "tokenizer_config.json", settings)


def _byte_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes. Source: GPT-2's ``bytes_to_unicode``."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    stand_ins = {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return [chr(byte) if byte in visible else stand_ins[byte] for byte in range(256)]


def _word(index: int) -> str:
    """The index-th made-up word, with the blank before it: three syllables out of 70."""
    word = "\u0120"
    for _ in range(3):
        index, syllable = divmod(index, 70)
        word += "bdfgklmnprstvz"[syllable % 14] + "aeiou"[syllable // 14]
    return word


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write a checkpoint: ``python -m sllmctl.bench.generate DIRECTORY --size 1GB``."""
    parser = argparse.ArgumentParser(prog="python -m sllmctl.bench.generate", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", type=parse_size, default=10**9, help="such as 1GB or 600MiB")
    parser.add_argument("--max-shard-size", type=parse_size, default=4 * 10**9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        make_qwen3(
            options.directory,
            options.size,
            max_shard_bytes=options.max_shard_size,
            seed=options.seed,
        )
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
