"""`make fuzz`: damaged files and hostile numbers, until a count or a time is reached.

    make fuzz COUNT=20000 SEED=1
    make fuzz ARGS="--targets idx,cache --seconds 60"
    make fuzz ARGS="--only idx:123"

Exit status 1 when a case ended by a signal, a hang, an exception that is no refusal, or a result
that a checksum or a structural rule could have told from the right one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz.harness import Case, prepared, run_all
from fuzz.targets import TARGETS, cases

from megatron_meco.errors import MeCoError


def main() -> int:
    """Run cases and print what came of them."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="cases; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="other cases; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no case later")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--only", metavar="TARGET:SEED", help="one case, here, with its traceback")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if args.only:
            name, _, seed = args.only.partition(":")
            return run_one(Case(name, int(seed)), Path(folder))
        names = args.targets.split(",")
        unknown = [name for name in names if name not in TARGETS]
        if unknown:
            parser.error(f"no target {unknown[0]!r}; there are {', '.join(TARGETS)}")
        targets = dict(prepared((TARGETS[name]() for name in names), Path(folder)))
        chosen = islice(cases(names, args.seed), args.count)
        report = run_all(targets, chosen, workers=args.workers, seconds=args.seconds)
    for name, outcomes in sorted(report.outcomes.items()):
        told = ", ".join(f"{n:,} {outcome}" for outcome, n in outcomes.most_common())
        print(f"{name}: {outcomes.total():,} cases: {told}")
    print(f"{report.num_cases:,} cases in {report.seconds:.0f} s, {len(report.failures)} failures")
    for failure in report.failures:
        print(f"\n{failure}")
    return 1 if report.failures else 0


def run_one(case: Case, folder: Path) -> int:
    """Run one case in this process."""
    import random

    ((_, target),) = prepared([TARGETS[case.target]()], folder)
    scratch = folder / "case"
    scratch.mkdir()
    try:
        print(f"{case}: {target.attempt(random.Random(str(case)), scratch)}")
    except MeCoError as refusal:
        print(f"{case}: refused: {refusal}")
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
