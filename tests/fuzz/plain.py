"""Fuzz a target without guidance, where atheris cannot be installed, and in the tests."""

from __future__ import annotations

import random

from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS, regressions, seeds

_KEPT = 500


def fuzz(target: str, *, inputs: int, seed: int) -> None:
    """Run so many mutated inputs.

    Raises:
        AssertionError: One failed; the message holds it.
    """
    rng = random.Random(seed)
    corpus = [*seeds(target), *(path.read_bytes() for path in regressions(target))]
    run = TARGETS[target]
    for _ in range(inputs):
        data = mutate(rng.choice(corpus), rng, framed=target == "header")[:16384]
        try:
            run(data)
        except Exception as exc:
            raise AssertionError(f"{target} fails with {exc!r} on {data!r}") from exc
        # Mutants of mutants go where one change from a right input does not.
        if rng.random() < 0.05:
            if len(corpus) < _KEPT:
                corpus.append(data)
            else:
                corpus[rng.randrange(_KEPT)] = data
