"""`make bench`: every benchmark in turn, one line of JSON each, also written to results.json.

Takes about twenty minutes on two cores; `--quick` takes four and says less. Nothing here is a test:
a time on a shared machine proves nothing, a ratio measured in one run says something.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def commands(quick: bool) -> list[list[str]]:
    """The benchmarks and their arguments."""
    documents = ["1e6"] if quick else ["1e6", "1e7"]
    plans = [
        ["bench_plans.py", "--documents", n, "--sequence-length", str(length)]
        for n in documents
        for length in (8192, 2048)
    ]
    samples = [["bench_samples.py", "--sequence-length", str(length)] for length in (8192, 2048)]
    samples += [["bench_loader.py", "--sequence-length", str(length)] for length in (8192, 2048)]
    billion = [["bench_billion.py", "--documents", "1e7" if quick else "1e9"]]
    prefixes = [["bench_prefixes.py", "--documents", "1e6" if quick else "1e7"]]
    prepare = [["bench_prepare.py", "--rounds", "1" if quick else "3"]]
    rounds = ["--rounds", "1" if quick else "5"]
    steps = [["bench_cpu_step.py", "--size", size, *rounds] for size in ("demo", "study")]
    return [*plans, *samples, *billion, *prefixes, *prepare, *steps]


def main() -> int:
    """Run all, print and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    results: list[dict[str, object]] = [{"commit": commit, "machine": machine}]
    failed = 0
    for script, *flags in commands(args.quick):
        print(f"$ python benchmarks/{script} {' '.join(flags)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(HERE / script), *flags],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            failed += 1
            print(done.stderr[-2000:], file=sys.stderr)
            continue
        line = done.stdout.splitlines()[-1]
        print(line, flush=True)
        results.append({"command": " ".join([script, *flags]), **json.loads(line)})
    (HERE / "results.json").write_text("\n".join(map(json.dumps, results)) + "\n")
    print(f"written to {HERE / 'results.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
