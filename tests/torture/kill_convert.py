"""Kill a conversion at random instants, and see that it never leaves a half checkpoint.

`python -m tests.torture.kill_convert --count 200` runs `sllmctl convert` on a generated model and
ends it with SIGKILL between its first and its last moment, every other time over an older
checkpoint. After each kill the target is the old state or the new one, and a rerun completes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from sllmctl.core.manifest import read_manifest
from sllmctl.core.verify import verify

SHARD = "16MiB"


def make_source(directory: Path, mark: str, *, megabytes: int) -> Path:
    """A safetensors model of random bytes; ``mark`` tells one from another."""
    directory.mkdir(parents=True)
    header = {}
    tensors = max(1, megabytes // 4)
    for number in range(tensors):
        begin = number * 2**22
        header[f"layers.{number}.weight"] = {
            "dtype": "BF16",
            "shape": [2**11, 2**10],
            "data_offsets": [begin, begin + 2**22],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(tensors):
            file.write(os.urandom(2**22))
    (directory / "config.json").write_text(json.dumps({"mark": mark}))
    return directory


class Torture:
    """One series of kills.

    Attributes:
        outcomes: How often a kill left nothing, the old checkpoint or the new one.
        resumed: How many reruns found complete shards.
        failures: What must never be.
    """

    def __init__(self, directory: Path, *, megabytes: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._target = directory / "models" / "model"
        self._sources = {
            mark: make_source(directory / mark, mark, megabytes=megabytes) for mark in ("a", "b")
        }
        self.outcomes: Counter[str] = Counter()
        self.resumed = 0
        self.failures: list[str] = []
        self._duration_s = self._measure()

    def run(self, count: int) -> None:
        """Kill so many conversions."""
        for number in range(count):
            replace = number % 2 == 1
            if replace:
                self._convert("a").communicate()
            self._kill_once(replace=replace)
            shutil.rmtree(self._target.parent, ignore_errors=True)

    def _kill_once(self, *, replace: bool) -> None:
        process = self._convert("b", *(["--force"] if replace else []))
        instant_s = self._random.uniform(0, self._duration_s)
        try:
            process.communicate(timeout=instant_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        found = self._state()
        self.outcomes[found] += 1
        if found not in (("old", "new", "nothing") if replace else ("nothing", "new")):
            self.failures.append(f"killed after {instant_s:.3f} s: {found} at the target")
        again = self._convert("b", *(["--force"] if replace else []), "--json")
        document = json.loads(again.communicate()[0] or "{}")
        self.resumed += bool(document.get("resumed_shards"))
        left = {p.name for p in self._target.parent.iterdir()} - {self._target.name}
        if again.returncode != 0 or self._state() != "new" or left:
            self.failures.append(
                f"killed after {instant_s:.3f} s: the rerun left {self._state()} and {left}"
            )

    def _state(self) -> str:
        if not self._target.exists():
            return "nothing"
        problems = verify(self._target).problems
        if problems or read_manifest(self._target) is None:
            return f"damage ({problems[0].message if problems else 'no manifest'})"
        mark = json.loads((self._target / "config.json").read_text())["mark"]
        return {"a": "old", "b": "new"}[mark]

    def _convert(self, mark: str, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "sllmctl", "convert", str(self._sources[mark])),
                *("--output", str(self._target), "--max-shard-size", SHARD, *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def _measure(self) -> float:
        """How long a conversion takes, from the start of its process to its end."""
        times = []
        for _ in range(3):
            started = time.monotonic()
            self._convert("b").communicate()
            times.append(time.monotonic() - started)
            shutil.rmtree(self._target.parent)
        return max(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=64, help="size of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to work")
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.directory) as directory:
        torture = Torture(Path(directory), megabytes=arguments.megabytes, seed=arguments.seed)
        torture.run(arguments.count)
    for failure in torture.failures:
        print(failure)
    outcomes = ", ".join(f"{count} {state}" for state, count in sorted(torture.outcomes.items()))
    print(
        f"{arguments.count} kills left: {outcomes}; {torture.resumed} reruns took up shards; "
        f"{len(torture.failures)} failures"
    )
    sys.exit(1 if torture.failures else 0)


if __name__ == "__main__":
    main()
