"""What `from_pretrained` makes of a directory, what we do, and whether it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from sllmctl.transformers import load_model
from tests.models import AUTO_CLASS, same_bits

V5 = int(transformers.__version__.partition(".")[0]) >= 5
DTYPE = "dtype" if V5 else "torch_dtype"


def reference(path: Path, name: str, **kwargs: Any) -> Any:
    """A model by name, loaded by transformers."""
    auto = getattr(transformers, AUTO_CLASS[name])
    return auto.from_pretrained(path, **{DTYPE: "auto", **kwargs})


def loaded(path: Path, name: str, **kwargs: Any) -> Any:
    """A model by name, loaded by us."""
    return load_model(path, "cpu", hf_model_class=AUTO_CLASS[name], **kwargs)


def different(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Names that only one has, or whose tensors differ in dtype, shape or a bit."""
    return (mine.keys() ^ other.keys()) | {
        name for name in mine.keys() & other.keys() if not same_bits(mine[name], other[name])
    }


def assert_same_tensors(model: Any, expected: Any) -> None:
    """Parameters, buffers and what a save would write are the same; so are class and mode."""
    assert type(model) is type(expected)
    assert model.dtype == expected.dtype
    assert not model.training
    assert different(dict(model.named_parameters()), dict(expected.named_parameters())) == set()
    assert different(dict(model.named_buffers()), dict(expected.named_buffers())) == set()
    assert different(model.state_dict(), expected.state_dict()) == set()


def assert_same_model(model: Any, expected: Any) -> None:
    """The tensors are the same, and what the models say."""
    assert_same_tensors(model, expected)
    mine = outputs(model)
    assert mine.isfinite().all()
    assert same_bits(mine, outputs(expected))


def assert_same_tokens(model: Any, expected: Any) -> None:
    """Both generate the same, with the same settings; or neither generates."""
    assert model.can_generate() == expected.can_generate()
    if not model.can_generate():
        return
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    prompt = inputs(model)
    prompt.pop("decoder_input_ids", None)
    tokens = [m.generate(**prompt, max_new_tokens=8, do_sample=False) for m in (model, expected)]
    assert tokens[0].tolist() == tokens[1].tolist()


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """What a tiny model of `tests.architectures` takes: tokens, an image, sound."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.arange(3, 40) % 500).unsqueeze(0)
    image = torch.rand(1, 3, 28, 28, generator=generator).to(model.dtype)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": image}
    if model.main_input_name == "input_features":
        sound = torch.rand(1, 8, 128, generator=generator).to(model.dtype)
        return {"input_features": sound, "decoder_input_ids": ids[:, :9]}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :9]
    if model.config.model_type in ("siglip", "clip"):
        given["pixel_values"] = image
    elif model.config.model_type == "llava":
        ids[0, 3:7] = model.config.image_token_index  # one token a patch
        given["pixel_values"] = image
    elif model.config.model_type == "qwen2_vl":
        # Two by two patches of two frames, merged into one token.
        ids[0, 2:5] = torch.tensor([508, 509, 507])
        given["pixel_values"] = torch.rand(4, 3 * 2 * 14 * 14, generator=generator).to(model.dtype)
        given["image_grid_thw"] = torch.tensor([[1, 2, 2]])
        given["mm_token_type_ids"] = (ids == 509).int()
        if not V5:
            del given["mm_token_type_ids"]
    return given


def outputs(model: Any) -> torch.Tensor:
    """What the model makes of its inputs: logits, where it has any."""
    with torch.no_grad():
        result = model(**inputs(model))
    kinds = ("logits", "logits_per_image", "last_hidden_state")
    return next(result[kind] for kind in kinds if kind in result)
