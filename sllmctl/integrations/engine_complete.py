"""Whether a model got all its weights: engines start without some, and answer nonsense."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sllmctl.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from sllmctl.integrations.engine_copy import WeightWrites
    from sllmctl.integrations.engine_source import CheckLevel

log = logging.getLogger(__name__)

DRAFT_SHARED = ("embed_tokens.weight", "lm_head.weight")
"""A draft model without them shares the target's. Source: vLLM 0.32, v1/spec_decode."""
_SHOWN = 4
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def require_complete(
    model: nn.Module,
    writes: WeightWrites,
    loaded: Collection[str] | None,
    names: Collection[str],
    *,
    where: str,
    level: CheckLevel = "full",
    optional: Collection[str] = (),
    prefilled: Collection[str] = (),
) -> None:
    """Refuse a model of which a parameter, or a part of one, never got its weights.

    Args:
        model: After its weights were loaded, before they are processed.
        writes: Was active meanwhile.
        loaded: Names of the parameters that the model says it loaded, if it says so.
        names: Names of the checkpoint's tensors.
        where: Names the checkpoint in the error.
        level: ``full``, or ``names`` to allow parameters that got a part of their bytes.
        optional: Names of parameters that may keep their initial values.
        prefilled: Names of parameters that may do so in part, such as in their padding, and of
            biases, unless it can be told that the checkpoint lacks a tensor of theirs.

    Raises:
        CheckpointError: It names parameters, bytes, and the tensors that the checkpoint lacks.
    """
    if level == "off":
        return
    lacking: dict[str, tuple[int, int]] = {}
    claims: list[str] = []
    for name, parameter in model.named_parameters():
        nbytes = parameter.numel() * parameter.element_size()
        if not nbytes or parameter.is_meta or name in optional:
            continue
        written = writes.written_bytes(parameter)
        claimed = loaded is not None and name in loaded
        if written == nbytes:
            continue
        if not written and claimed:
            # What was replaced, or written out of sight, is loaded when the model says so.
            claims.append(name)
        elif not written or level == "full":
            lacking[name] = (written or 0, nbytes)
    if claims:
        log.warning(
            "sllm: nothing was seen to be written to %d parameters of a %s that say they are "
            "loaded: %s",
            len(claims),
            type(model).__name__,
            ", ".join(claims[:_SHOWN]) + (", …" if len(claims) > _SHOWN else ""),
        )
    if not lacking:
        return
    packed = getattr(model, "packed_modules_mapping", None) or {}
    told = {absent.parameter for absent in _absent(list(lacking), names, packed) if absent.sure}
    lacking = {
        name: (written, nbytes)
        for name, (written, nbytes) in lacking.items()
        if name not in prefilled or name in told or not (written or name.endswith("bias"))
    }
    if not lacking:
        return
    parts = [
        f"`{name}` got {written} of {nbytes} bytes"
        for name, (written, nbytes) in list(lacking.items())[:_SHOWN]
    ]
    more = len(lacking) - _SHOWN
    shown = missing_tensors(list(lacking), names, packed)
    allows = "names" if all(written for written, _ in lacking.values()) else "off"
    raise CheckpointError(
        f"{where} does not fill a {type(model).__name__}: {', '.join(parts)}"
        + (f" and {more} more parameters" if more > 0 else "")
        + (f"; it has no {', '.join(f'`{name}`' for name in shown[:_SHOWN])}" if shown else ""),
        hint="convert or copy the checkpoint again; where the model is right to leave bytes out, "
        f'set "check": "{allows}" in the loader\'s extra configuration',
    )


def missing_tensors(
    parameters: Sequence[str], names: Collection[str], packed: Mapping[str, Sequence[str]]
) -> list[str]:
    """Name the tensors that a checkpoint lacks for these parameters, or else that it may lack."""
    found = _absent(parameters, names, packed)
    sure = [absent.name for absent in found if absent.sure]
    return list(dict.fromkeys(sure or [absent.name for absent in found]))


class _Absent(NamedTuple):
    """A tensor of a parameter that a checkpoint does not have.

    A name that only our guess of the model's naming makes up is not sure.
    """

    parameter: str
    name: str
    sure: bool


def _absent(
    parameters: Sequence[str], names: Collection[str], packed: Mapping[str, Sequence[str]]
) -> list[_Absent]:
    """Find what a checkpoint may lack for these parameters.

    A fused parameter has its parts' names by the model's own table; and what every other layer
    has, this one should have.
    """
    known = set(names)
    kinds = {_pattern(name) for name in names}
    found = []
    for parameter in parameters:
        *_, module, _ = ("", "", *parameter.split("."))
        parts = [parameter.replace(f".{module}.", f".{part}.") for part in packed.get(module, ())]
        in_parts = not known.isdisjoint(parts)
        for name in parts or [parameter]:
            if name not in known:
                found.append(_Absent(parameter, name, in_parts or _pattern(name) in kinds))
    irregular = _irregular(known)
    for parameter in parameters:
        place = parameter.rsplit(".", 2)[0] + "."
        found += [_Absent(parameter, n, sure=True) for n in irregular if n.startswith(place)]
    return found


def _pattern(name: str) -> str:
    return _NUMBER.sub("#", name)


def _irregular(names: Collection[str]) -> list[str]:
    """Names that are missing from one layer, or one expert, and there in others of its kind."""
    numbers: dict[tuple[str, str], set[str]] = defaultdict(set)
    everywhere: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for match in _NUMBER.finditer(name):
            before, after = name[: match.start()], name[match.end() :]
            numbers[before, after].add(match[0])
            everywhere[before].add(match[0])
    return sorted(
        f"{before}{number}{after}"
        for (before, after), there in numbers.items()
        if 2 * len(there) >= len(everywhere[before])
        for number in everywhere[before] - there
    )
