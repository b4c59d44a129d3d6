"""Fuzz one target under the guidance of coverage: `python -m tests.fuzz.guided TARGET INPUTS DIR`.

DIR receives the corpus, and a file `crash-...` for an input that fails.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["sllmctl.core", "sllmctl.doctor", "sllmctl.store", "json"]
):
    import sllmctl.core.header
    import sllmctl.core.manifest
    import sllmctl.core.sllm_store
    import sllmctl.doctor.all_checks
    import sllmctl.store.connection  # noqa: F401 - imported here to be instrumented

from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS, regressions, seeds

LIMITS = ("-timeout=5", "-rss_limit_mb=1024", "-malloc_limit_mb=512", "-max_len=16384")


def main() -> None:
    name, inputs, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    corpus = directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate([*seeds(name), *(p.read_bytes() for p in regressions(name))]):
        (corpus / f"seed-{number}").write_bytes(seed)

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return atheris.Mutate(data, max_size)  # type: ignore[no-any-return]
        return mutate(data, rng, framed=name == "header")[:max_size]

    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-runs={inputs}",
            f"-artifact_prefix={directory}/",
            "-print_final_stats=1",
            *LIMITS,
        ],
        TARGETS[name],
        custom_mutator=custom,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
