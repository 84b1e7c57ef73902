"""Ask Megatron's own parser and validation about a run, before anything starts.

`check_run` does it in a process of its own (`python -m megatron_meco.run.check`): torch and
Megatron would otherwise stay in the memory of the process that waits for the run.
Takes the seconds that their import takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_meco.errors import MeCoError

_RESULT = "meco-check:"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What validation made of a run.

    Attributes:
        on_cpu: Whether torch sees no CUDA device here.
        num_gpus: CUDA devices that it sees.
        train_iters: Training steps of the run.
        switch_iteration: Steps before the cooldown; None without MeCo.
        seq_length: Tokens of a sequence.
        gpu_only: What the run asks for that this host lacks: flag and remedy.
        notes: What was not checked, one line each.
    """

    on_cpu: bool
    num_gpus: int
    train_iters: int | None = None
    switch_iteration: int | None = None
    seq_length: int | None = None
    gpu_only: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_run(flags: Sequence[str], num_ranks: int, env: Mapping[str, str]) -> Facts:
    """Validate the flags of a run.

    Args:
        flags: Those of the training script, `--meco` among them or not. Without it there is nothing
            that could be validated outside of a run, and only the host is looked at.
        num_ranks: Ranks of the run.
        env: Variables that the ranks get beside those of this process.

    Raises:
        MeCoError: The run would not start.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__],
        input=json.dumps({"flags": list(flags)}),
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **env, "WORLD_SIZE": str(num_ranks), "RANK": "0"},
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if results:
        told = json.loads(results[-1].removeprefix(_RESULT))
        if "refusal" in told:
            what, where, remedy = told["refusal"]
            raise MeCoError(what, where=where, remedy=remedy)
        return Facts(**told)
    raise _failed(done.returncode, done.stderr)


def _failed(status: int, stderr: str) -> MeCoError:
    lines = [line for line in stderr.splitlines() if line.strip()]
    for line in lines:
        # Megatron's parser ends the process itself.
        if line.startswith("meco: error: "):
            return MeCoError(
                line.removeprefix("meco: error: "), where="Megatron's parser", remedy=""
            )
    last = lines[-1][:300] if lines else f"exit status {status}"
    return MeCoError(
        f"cannot be asked about this run ({last})",
        where="Megatron",
        remedy="`meco doctor` says what is missing and how to mend it.",
    )


def _inspect(flags: list[str]) -> Facts:
    from megatron_meco.training.cpu import impossible_flags, should_use_cpu
    from megatron_meco.training.kernels import hide_gpu_libraries

    hide_gpu_libraries()
    import torch

    host: dict[str, Any] = {"on_cpu": should_use_cpu(), "num_gpus": torch.cuda.device_count()}
    if "--meco" not in flags:
        return Facts(**host)
    from megatron_meco.training.arguments import parse_run, schedule_from_args

    args, notes = parse_run([flag for flag in flags if flag != "--meco"])
    schedule = schedule_from_args(args)
    return Facts(
        **host,
        train_iters=schedule.num_iterations,
        switch_iteration=schedule.switch_iteration,
        seq_length=args.seq_length,
        gpu_only=[list(pair) for pair in impossible_flags(args)] if host["on_cpu"] else [],
        notes=notes,
    )


def main() -> int:
    """Read a run from stdin, and print what validation made of it."""
    flags = json.load(sys.stdin)["flags"]
    # Megatron prints; the result goes where it was meant to go all the same.
    with os.fdopen(os.dup(1), "w") as result:
        os.dup2(2, 1)
        try:
            told: dict[str, Any] = asdict(_inspect(flags))
        except MeCoError as error:
            first = error.original()
            told = {"refusal": [first.what, first.where, first.remedy]}
        print(_RESULT + json.dumps(told, default=str), file=result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
