"""`load --prompt`: a loaded checkpoint answers as transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sllmctl
from sllmctl.errors import ConfigError
from sllmctl.integrations.generate import Embedded, Generated, answer
from tests.models import AUTO_CLASS

GENERATIVE = ["qwen3", "qwen3-tied", "llama", "opt", "qwen3-moe", "t5", "bart", "llava"]


def answered(path: Path, prompt: str = "Hello, my name", count: int = 8) -> Generated | Embedded:
    return answer(path, sllmctl.load_tensors(path), prompt, max_new_tokens=count)


@pytest.mark.parametrize("name", GENERATIVE)
def test_tokens_are_those_of_transformers(name: str, original: Any, converted: Any) -> None:
    auto = getattr(transformers, AUTO_CLASS[name])
    model = auto.from_pretrained(original(name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(original(name))
    text = "Hello, my name"
    if tokenizer.chat_template is not None:
        text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )[0].tolist()
    expected = tokens if model.config.is_encoder_decoder else tokens[ids.shape[1] :]
    given = answered(converted(name))
    assert isinstance(given, Generated)
    assert list(given.token_ids) == expected
    assert given.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert given.prompt_tokens == ids.shape[1]


def test_an_encoder_embeds_the_prompt_and_says_so(converted: Any) -> None:
    given = answered(converted("bert"))
    assert isinstance(given, Embedded)
    assert len(given.embedding) == 128
    assert given.norm == pytest.approx(torch.tensor(given.embedding).norm().item())
    assert "generates no text" in given.lines()[0]


def test_similar_sentences_have_similar_embeddings(original: Any) -> None:
    sentences = ("The cat sits on the mat", "A cat is sitting on a rug", "Interest rates rose")
    cat, rug, rates = (
        torch.nn.functional.normalize(
            torch.tensor(answered(original("minilm"), s).embedding), dim=0
        )
        for s in sentences
    )
    assert cat @ rug > 0.6
    assert cat @ rates < 0.2


def test_the_document_is_json(converted: Any) -> None:
    for name, key in (("qwen3", "token_ids"), ("bert", "embedding")):
        document = json.loads(json.dumps(answered(converted(name)).document()))
        assert document[key]
        assert document["prompt_tokens"] > 0


def test_what_a_terminal_obeys_is_made_visible() -> None:
    lines = Generated("red \x1b[31m alert\n", (1, 2), 3, 0.1, 0.1).lines()
    assert lines[0] == "red \\x1b[31m alert\n"


def test_an_empty_prompt_is_refused(converted: Any) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        answered(converted("qwen3-tied"), "")


def test_a_directory_without_tokenizer_is_refused(converted: Any, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("tokenizer*")
    path = Path(shutil.copytree(converted("qwen3"), tmp_path / "mute", ignore=ignored))
    with pytest.raises(ConfigError, match="no tokenizer"):
        answered(path)
