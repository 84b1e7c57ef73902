"""`meco train RUN.yaml`: check a run file, print or start its torchrun command, show how it goes.

The command works by itself, in the folder of the run file. torchrun writes to the log and not to
this process, so a run outlives the terminal that shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_meco.errors import MeCoError
from megatron_meco.run.check import Facts, check_run
from megatron_meco.run.flag_table import schema_text
from megatron_meco.run.launch import batch_script, in_slurm_job, shell_line, srun_lines
from megatron_meco.run.plain_yaml import RunFileError
from megatron_meco.run.run_file import RunFile, copy_of, read_run
from megatron_meco.run.run_folder import (
    Start,
    begin,
    last_checkpoint,
    last_checkpoint_file,
    versions,
)

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `meco train`."""
    parser.add_argument("run_file", nargs="?", metavar="RUN.yaml", help="What to run.")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="A key of the run file with another value, as often as needed: --set lr=1e-3, "
        "--set launch.nproc-per-node=8.",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the command, and start nothing."
    )
    parser.add_argument(
        "--schema",
        action="store_true",
        help="Print the JSON schema of run files, for editors, and start nothing.",
    )


def run_train(args: argparse.Namespace) -> int:
    """Run `meco train`."""
    if args.schema:
        print(schema_text(), end="")
        return 0
    if args.run_file is None:
        raise MeCoError("missing", where="RUN.yaml", remedy="Name the file of the run.")
    run = read_run(args.run_file, args.set)
    facts = _check(run)
    env = _environment(run, facts)
    slurm = run.launch.slurm is not None
    node = run.launch.options.get("node-rank") or os.environ.get("NODE_RANK") or "0"
    command = [*run.launch.torchrun(node), *run.flags()]
    if slurm and in_slurm_job():
        lines = srun_lines(run.launch, env, run.flags())
        shown = "\n".join(["#!/usr/bin/env bash", f"cd {shlex.quote(str(run.folder))}", *lines, ""])
    elif slurm:
        log = _folder(run) / "slurm-%j.log"
        shown = batch_script(run.launch, run.path.stem, run.folder, log, env, run.flags())
    else:
        shown = f"cd {shlex.quote(str(run.folder))} && {shell_line(command, env)}\n"
    for note in facts.notes:
        print(f"meco: note: {note}", file=sys.stderr)
    if args.dry_run:
        print(shown, end="")
        return 0
    _check_start(run, facts)
    files = {
        "run.yaml": copy_of(run),
        "command.sh": shown,
        "versions.txt": versions(),
    }
    start = begin(_folder(run), files, _node_name(run, node))
    if slurm and not in_slurm_job():
        return _submit(start, _folder(run))
    if slurm:
        command, env = ["bash", str(start.folder / "command.sh")], {}
    return _follow(run, start, command, env)


def _check(run: RunFile) -> Facts:
    try:
        with contextlib.chdir(run.folder):
            return check_run(run.flags(), run.launch.num_ranks, run.launch.env)
    except RunFileError:
        raise
    except MeCoError as error:
        raise run.locate(error) from error


def _check_start(run: RunFile, facts: Facts) -> None:
    """Refuse what only a start on this host, or into this folder, makes wrong."""
    save, load = run.settings.get("save"), run.settings.get("load")
    if save is None:
        raise RunFileError(
            "nothing says how often to save, so no training would be kept",
            where=str(run.path),
            remedy="Give save-interval: the number of steps between checkpoints.",
        )
    if load is not None and load.words != save.words:
        there = last_checkpoint(_folder(run))
        if there is not None:
            raise RunFileError(
                f"{save.words[0]} has the checkpoint of iteration {there}, and load starts from "
                f"{load.words[0]} again",
                where=load.where,
                remedy=f"Write load: {save.words[0]} to go on, or save into another folder.",
            )
        # Megatron would warn, and train from random weights.
        if last_checkpoint_file(run.folder / load.words[0]) is None and not run.value("ckpt-step"):
            raise RunFileError(
                f"{load.words[0]} holds no checkpoint, so there is nothing to start from",
                where=load.where,
                remedy="Name a folder that Megatron or `meco import` saved into, or drop load.",
            )
    if run.launch.script and not (run.folder / run.launch.script).is_file():
        raise RunFileError(
            f"launch names the script {run.launch.script}, and there is no such file",
            where=str(run.path),
            remedy="Name a Python file, relative to the folder of the run file.",
        )
    if run.launch.slurm is not None:
        return
    if facts.gpu_only:
        flag, remedy = facts.gpu_only[0]
        error = MeCoError("needs a GPU, and torch sees none here", where=flag, remedy=remedy)
        raise run.locate(error)
    ranks = run.launch.nproc_per_node
    if not facts.on_cpu and ranks > facts.num_gpus:
        raise RunFileError(
            f"nproc-per-node is {ranks}, and torch sees {facts.num_gpus} GPUs here",
            where=str(run.path),
            remedy=f"Write nproc-per-node: {facts.num_gpus} in launch.",
        )


def _folder(run: RunFile) -> Path:
    return run.folder / str(run.value("save"))


def _node_name(run: RunFile, node: str) -> str:
    if run.launch.nnodes == 1 or run.launch.slurm is not None:
        return ""
    return socket.gethostname() if run.launch.same_command_everywhere else f"node{node}"


def _environment(run: RunFile, facts: Facts) -> dict[str, str]:
    """Variables of the ranks beside those of this process."""
    env = {"PYTHONUNBUFFERED": "1"}
    ranks = run.launch.nproc_per_node
    if not facts.on_cpu or facts.gpu_only or run.launch.slurm is not None:
        # Megatron asks for it with tensor parallelism on GPUs before Blackwell.
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    elif ranks > 1:
        # torchrun's default is 1.
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    if run.value("fp8-recipe") == "delayed":
        # The state of delayed scaling is pickled in checkpoints, which Transformer Engine from 2.18
        # on reads when it is told to. These checkpoints are the run's own.
        env["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"
    env = {name: value for name, value in env.items() if name not in os.environ}
    return {**env, **run.launch.env}


def _submit(start: Start, folder: Path) -> int:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise MeCoError(
            "is not installed here, and launch says slurm",
            where="sbatch",
            remedy=f"Submit {start.folder / 'command.sh'} from a host of the cluster.",
        )
    done = subprocess.run([sbatch, str(start.folder / "command.sh")], check=False)
    if done.returncode == 0:
        print(f"`meco watch {folder}/slurm-JOB.log` shows how it goes.", file=sys.stderr)
    return int(done.returncode != 0)


def _follow(run: RunFile, start: Start, command: list[str], env: Mapping[str, str]) -> int:
    """Start the ranks, and show their log until they end."""
    # Late: rich takes longer to load than all the rest of a dry run.
    from megatron_meco.run.watch import Follower

    there = last_checkpoint(_folder(run))
    follower = Follower(start.log)
    follower.say(f"log {os.path.relpath(start.log)}")
    if there is not None and run.value("load") == run.value("save"):
        follower.say(f"going on from the checkpoint of iteration {there:,}")
    with start.log.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=run.folder,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # An interrupt reaches this process alone, which passes it on once.
            start_new_session=True,
            pass_fds=() if start.lock is None else (start.lock,),
        )
    with _signals_for(process) as received:
        status = follower.follow(process.poll)
    if received and status:
        there = last_checkpoint(_folder(run))
        goes_on = "starts anew" if there is None else f"goes on from iteration {there:,}"
        follower.say(f"ended by {received[0].name}; the same command {goes_on}")
        return 128 + received[0]
    return follower.conclude(status)


@contextlib.contextmanager
def _signals_for(process: subprocess.Popen[bytes]) -> Iterator[list[signal.Signals]]:
    """Pass signals that end a run on to torchrun, which ends its ranks; yields those that came."""
    received: list[signal.Signals] = []

    def handle(number: int, _frame: object) -> None:
        received.append(signal.Signals(number))
        with contextlib.suppress(ProcessLookupError):
            # With --exit-signal-handler ranks save first.
            process.send_signal(signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        for number, handler in before.items():
            # Under nohup a closed terminal ends nothing.
            if handler is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
