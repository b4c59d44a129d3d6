"""Show that a loaded checkpoint works: build the model it names, and let it answer a prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllmctl.core.units import format_seconds
from sllmctl.errors import ConfigError
from sllmctl.integrations.hf_build import build_model, make_skeleton

if TYPE_CHECKING:
    import torch

_SHOWN_VALUES = 4
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class Generated:
    """What a generative model says.

    Attributes:
        text: The answer, without the prompt.
        token_ids: Its tokens, the one that ends it included.
        prompt_tokens: Tokens of the prompt, the chat template's included.
        model_s: Seconds that building the model took.
        answer_s: Seconds that generating took.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    model_s: float
    answer_s: float

    def document(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The answer for people, with what a terminal might obey made visible."""
        count = len(self.token_ids)
        shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in self.text)
        return [
            shown or "(special tokens alone)",
            "",
            f"{count} tokens in {format_seconds(self.answer_s)} ({count / self.answer_s:.3g}/s), "
            f"model built in {format_seconds(self.model_s)}",
        ]


@dataclass(frozen=True, slots=True)
class Embedded:
    """What an encoder, which generates no text, makes of a prompt: the mean of its token vectors.

    Attributes:
        embedding: The mean, one float32 a dimension.
        norm: Its Euclidean length.
        prompt_tokens: Tokens of the prompt.
        model_s: Seconds that building the model took.
        answer_s: Seconds that the forward pass took.
    """

    embedding: tuple[float, ...]
    norm: float
    prompt_tokens: int
    model_s: float
    answer_s: float

    def document(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The embedding for people: its first values and its length."""
        first = ", ".join(f"{value:.4f}" for value in self.embedding[:_SHOWN_VALUES])
        return [
            f"the model is an encoder and generates no text; it embeds {self.prompt_tokens} tokens "
            f"as {len(self.embedding)} values of norm {self.norm:.4f}: {first}, …",
            "",
            f"{format_seconds(self.answer_s)}, model built in {format_seconds(self.model_s)}",
        ]


def answer(
    path: Path, tensors: Mapping[str, torch.Tensor], prompt: str, *, max_new_tokens: int = 32
) -> Generated | Embedded:
    """Answer a prompt: greedily, so that the same weights say the same; an encoder embeds it.

    Args:
        path: The checkpoint's directory, with configuration and tokenizer. A chat template there
            wraps the prompt as a user's turn.
        tensors: The checkpoint's tensors, all on the device that is to answer.
        prompt: Text of one token at least.
        max_new_tokens: Upper bound of the answer.

    Raises:
        CheckpointError: A weight is missing, unexpected or of another shape.
        ConfigError: transformers cannot make the model, there is no tokenizer, or no prompt.
    """
    import torch

    tokenizer = _tokenizer(path)
    started = time.perf_counter()
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    model = build_model(
        make_skeleton(path, _named_class(path)),
        tensors,
        device_map=None if device.type == "cpu" else {"": str(device)},
    )
    built = time.perf_counter()
    generative = model.can_generate()
    given = _inputs(tokenizer, prompt, chat=generative)
    inputs = {key: value.to(device) for key, value in given.items()}
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise ConfigError("the prompt is empty", hint="write a few words for the model to answer")
    asked = time.perf_counter()
    with torch.inference_mode():
        output = (
            _generate(model, tokenizer, inputs, max_new_tokens)
            if generative
            else model.base_model(**inputs).last_hidden_state[0].float().mean(dim=0)
        )
    answer_s = time.perf_counter() - asked
    values = tuple(output.tolist())
    if not generative:
        return Embedded(values, output.norm().item(), prompt_tokens, built - started, answer_s)
    text = tokenizer.decode(output, skip_special_tokens=True)
    return Generated(text, values, prompt_tokens, built - started, answer_s)


def _named_class(path: Path) -> str:
    """The class that config.json names, where transformers has it, else an Auto class to try."""
    import transformers

    try:
        name = json.loads((path / "config.json").read_bytes())["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):
        name = None
    known = isinstance(name, str) and hasattr(transformers, name)
    return name if known else "AutoModelForCausalLM"


def _tokenizer(path: Path) -> Any:
    import transformers

    try:
        # Without files transformers 5.x makes a tokenizer that knows no word.
        if not any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
            raise FileNotFoundError("no tokenizer files")
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"`{path}` has no tokenizer that transformers {transformers.__version__} can read",
            hint="a prompt needs one: convert the whole model directory",
        ) from exc


def _inputs(tokenizer: Any, prompt: str, *, chat: bool) -> dict[str, torch.Tensor]:
    if chat and tokenizer.chat_template is not None:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    # Not all that a tokenizer returns: many models refuse the token types.
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def _generate(
    model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int
) -> torch.Tensor:
    pad = tokenizer.pad_token_id
    tokens: torch.Tensor = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        # Naming one keeps transformers from saying on stderr that it chose one.
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )[0]
    return tokens if model.config.is_encoder_decoder else tokens[inputs["input_ids"].shape[1] :]
