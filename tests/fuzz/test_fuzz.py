"""A short run of `make fuzz`, and whether its harness sees what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
# `model` and `checkpoint` are in `make fuzz` alone: what they find is listed there.
TARGETS = (
    "core",
    "idx",
    "bin",
    "metadata",
    "manifest",
    "cache",
    "mds",
    "model",
    "checkpoint",
    "commands",
)


def run(code: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: forking one with threads, as pytest's workers are, may stop it.
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.run(
        [sys.executable, "-W", "ignore", *code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **variables},
        timeout=240,
    )


def test_no_damage_ends_a_process_or_gives_wrong_samples() -> None:
    words = ["--count", "1600", "--seconds", "60", "--targets", ",".join(TARGETS)]
    done = run(["-m", "fuzz", *words])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    told = {line.split(":")[0]: line for line in done.stdout.splitlines() if " cases: " in line}
    assert set(told) == set(TARGETS)
    # Neither refuses everything nor accepts everything.
    assert all("refused" in line and " same" in line for line in told.values()), told


CRASHES = """
import os, signal, sys, time
from pathlib import Path
from fuzz import harness
from fuzz.harness import Case, Target, Wrong, run_all
from megatron_meco.errors import DataError

harness.SECONDS_PER_CASE = 1.0
ENDS = {
    3: lambda: os.kill(os.getpid(), signal.SIGSEGV),
    4: lambda: {}["no such key"],
    5: lambda: os._exit(7),
    6: lambda: time.sleep(60),
    7: lambda: bytearray(1 << 40),
}

class Odd(Target):
    name = "odd"

    def attempt(self, draw, folder):
        seed = int(folder.name.split("-")[-1])
        assert draw.random() == __import__("random").Random(f"odd:{seed}").random()
        (folder / "file").write_text("")
        if seed in ENDS:
            ENDS[seed]()
        if seed == 8:
            raise Wrong("other samples")
        if seed % 2:
            raise DataError("damaged", where="file", remedy="Copy it.")
        return "same"

if __name__ == "__main__":
    cases = [Case("odd", seed) for seed in range(40)]
    report = run_all({"odd": Odd()}, cases, workers=2, seconds=60)
    print(dict(sorted(report.outcomes["odd"].items())))
    for failure in sorted(report.failures, key=lambda failure: failure.case.seed):
        print(str(failure).splitlines()[0], str(failure).splitlines()[1].strip(), sep=" | ")
"""


def test_the_harness_names_crashes_hangs_exceptions_and_wrong_results(tmp_path: Path) -> None:
    script = tmp_path / "odd.py"
    script.write_text(CRASHES)
    done = run([str(script)])
    assert done.returncode == 0, done.stderr
    counts, *failures = done.stdout.splitlines()
    assert counts == "{'FAILED': 6, 'refused': 17, 'same': 17}"
    for line, seed, told in zip(
        failures,
        range(3, 9),
        (
            "ended by SIGSEGV",
            "KeyError: 'no such key'",
            "ended with status 7",
            "hangs: more than 1 s",
            "MemoryError",
            "wrong: other samples",
        ),
        strict=True,
    ):
        assert line == f'odd:{seed}: {told} | make fuzz ARGS="--only odd:{seed}"'
