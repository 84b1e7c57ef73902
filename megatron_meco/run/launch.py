"""How the ranks of a run start: torchrun on one node or on several, or a job of Slurm's.

The keys of `launch` are torchrun's options, and `script`, `env`, `slurm` and `srun`. Nothing is
started here; commands are lists of words, written out by `shell_line`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_meco.run.flag_table import KnownFlag
from megatron_meco.run.plain_yaml import Entries, Node, RunFileError, Scalar
from megatron_meco.run.values import nearest, words_of

TRAINING_MODULE = "megatron_meco.training.pretrain"
"""What the ranks run unless `script` names another program."""

_PORT = 29500
_MOST_RANKS = 10**7
_OPTIONS = {
    flag.key: flag
    for flag in (
        KnownFlag(option="--nnodes", dest="nnodes", kind="int", default=1, help="Number of nodes."),
        KnownFlag(
            option="--nproc-per-node",
            dest="nproc_per_node",
            kind="int",
            default=1,
            help="Ranks on each node: its GPUs; on a CPU most often 1.",
        ),
        KnownFlag(
            option="--node-rank",
            dest="node_rank",
            kind="int",
            help="The number of this node, from 0; most often given by --set, or as the variable "
            "NODE_RANK.",
        ),
        KnownFlag(
            option="--master-addr",
            dest="master_addr",
            kind="text",
            help="The name or address of node 0, for several nodes without Slurm.",
        ),
        KnownFlag(
            option="--master-port",
            dest="master_port",
            kind="int",
            help=f"A free port there. Default: {_PORT}.",
        ),
        KnownFlag(
            option="--rdzv-backend",
            dest="rdzv_backend",
            kind="text",
            choices=("c10d", "static"),
            help="torchrun's rendezvous: c10d takes the same command on every node.",
        ),
        KnownFlag(
            option="--rdzv-endpoint",
            dest="rdzv_endpoint",
            kind="text",
            help="HOST:PORT of the rendezvous.",
        ),
        KnownFlag(
            option="--rdzv-id",
            dest="rdzv_id",
            kind="text",
            help="A name that the nodes of one run share.",
        ),
        KnownFlag(
            option="--max-restarts",
            dest="max_restarts",
            kind="int",
            help="How often torchrun starts all ranks again after a failure. Default: 0.",
        ),
        KnownFlag(
            option="--script",
            dest="script",
            kind="text",
            help="A training script of your own that takes the same flags. Default: MeCo's.",
        ),
    )
}
_MAPS = {
    "env": "Environment variables of the ranks, by name.",
    "slurm": "Options of sbatch, by name: the run is submitted as a job.",
}
_SRUN = KnownFlag(
    option="--srun",
    dest="srun",
    kind="text",
    count="*",
    help="Further arguments for srun, as for a container.",
)
LAUNCH_KEYS = (*_OPTIONS, *_MAPS, _SRUN.key)
"""The keys of `launch`."""

# Worked out from the others.
_OWN_SBATCH = {
    "nodes": "nnodes",
    "ntasks-per-node": "nproc-per-node",
    "ntasks": "nnodes and nproc-per-node",
    "wrap": "script",
}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SBATCH_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What `launch` says.

    Attributes:
        nnodes: Number of nodes.
        nproc_per_node: Ranks on each.
        options: Further options of torchrun by key.
        script: A training script, or "" for MeCo's own.
        env: Environment variables of the ranks.
        slurm: Options of sbatch; None: no Slurm.
        srun: Further arguments for srun.
    """

    nnodes: int = 1
    nproc_per_node: int = 1
    options: Mapping[str, str] = field(default_factory=dict)
    script: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    slurm: Mapping[str, str] | None = None
    srun: tuple[str, ...] = ()

    @property
    def num_ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nnodes * self.nproc_per_node

    @property
    def program(self) -> tuple[str, ...]:
        """What torchrun is to run on each rank."""
        return (self.script,) if self.script else ("--module", TRAINING_MODULE)

    @property
    def same_command_everywhere(self) -> bool:
        """Whether every node has the same command."""
        return self.nnodes == 1 or self.options.get("rdzv-backend") == "c10d"

    def torchrun(self, node_rank: str) -> list[str]:
        """Torchrun's command up to the flags of the training script.

        Args:
            node_rank: The number of the node, or a shell's expression for it.
        """
        command = [sys.executable, "-m", "torch.distributed.run"]
        options = dict(self.options)
        if self.nnodes == 1 and not options.keys() - {"max-restarts"}:
            # Takes a free port; the name of a laptop often leads nowhere.
            command += ["--standalone", "--local-addr", "127.0.0.1"]
        elif not self.same_command_everywhere:
            options = {"node-rank": node_rank, "master-port": str(_PORT), **options}
        command += ["--nnodes", str(self.nnodes), "--nproc-per-node", str(self.nproc_per_node)]
        for key, value in options.items():
            command += [f"--{key}", value]
        return [*command, *self.program]


def launch_schema() -> dict[str, Any]:
    """The JSON schema of `launch`."""
    texts = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
    maps: dict[str, dict[str, Any]] = {
        "env": texts,
        # `slurm: true` submits with sbatch's own defaults, and `exclusive: true` has no value.
        "slurm": {
            "type": ["object", "boolean"],
            "additionalProperties": {"type": ["string", "number", "boolean"]},
        },
    }
    return {
        "type": "object",
        "description": "How the ranks start.",
        "additionalProperties": False,
        "properties": {
            **{flag.key: flag.schema() for flag in (*_OPTIONS.values(), _SRUN)},
            **{name: {**maps[name], "description": text} for name, text in _MAPS.items()},
        },
    }


def read_launch(node: Node, file: Path) -> Launch:
    """Read the value of `launch`.

    Args:
        node: The value.
        file: The run file, for messages.

    Raises:
        RunFileError: A key is unknown, or a value is of another type.
    """
    if not isinstance(node, Entries):
        raise RunFileError(
            "launch takes keys of its own",
            where=_place(file, node.line),
            remedy=f"Indent them below it: {', '.join(LAUNCH_KEYS)}.",
        )
    options: dict[str, str] = {}
    maps: dict[str, Mapping[str, str] | None] = {}
    srun: tuple[str, ...] = ()
    for key, value in node.entries:
        name, where = key.text.replace("_", "-"), _place(file, key.line)
        if name in _OPTIONS:
            options[name] = words_of(_OPTIONS[name], value, where)[0]
        elif name in _MAPS:
            maps[name] = _map(name, value, where, file)
        elif name == _SRUN.key:
            srun = words_of(_SRUN, value, where)
        else:
            hint = nearest(name, LAUNCH_KEYS).strip()
            raise RunFileError(
                f"unknown key {key.text[:60]} in launch",
                where=where,
                remedy=hint or f"There are {', '.join(LAUNCH_KEYS)}.",
            )
    launch = Launch(
        nnodes=int(options.pop("nnodes", 1)),
        nproc_per_node=int(options.pop("nproc-per-node", 1)),
        script=options.pop("script", ""),
        options=options,
        env=maps.get("env") or {},
        slurm=maps.get("slurm"),
        srun=srun,
    )
    _check(launch, _place(file, node.line))
    return launch


def _place(file: Path, line: int) -> str:
    return f"{file}:{line}" if line else "--set launch"


def _map(name: str, node: Node, where: str, file: Path) -> Mapping[str, str]:
    if isinstance(node, Scalar) and node.plain and node.text == "true" and name == "slurm":
        return {}
    if not isinstance(node, Entries):
        raise RunFileError(
            f"{name} takes keys of its own", where=where, remedy="Write `key: value` below it."
        )
    found: dict[str, str] = {}
    pattern = _VARIABLE if name == "env" else _SBATCH_OPTION
    for key, value in node.entries:
        here = _place(file, key.line)
        if not pattern.fullmatch(key.text):
            raise RunFileError(
                f"{key.text[:60]!r} cannot be a key of {name}", where=here, remedy="Correct it."
            )
        if name == "slurm" and key.text in _OWN_SBATCH:
            raise RunFileError(
                f"{key.text} follows from other keys",
                where=here,
                remedy=f"Give {_OWN_SBATCH[key.text]} in launch.",
            )
        # `exclusive: true` is an option without a value.
        is_bare = isinstance(value, Scalar) and value.plain and value.text == "true"
        flag = KnownFlag(option=f"--{key.text}", dest="", kind="text")
        found[key.text] = "" if name == "slurm" and is_bare else words_of(flag, value, here)[0]
        if "\n" in found[key.text]:
            raise RunFileError(
                f"{key.text} holds a line end", where=here, remedy="Write it on one line."
            )
    return found


def _check(launch: Launch, where: str) -> None:
    for name in ("nnodes", "nproc_per_node"):
        value = getattr(launch, name)
        if not 1 <= value <= _MOST_RANKS:
            raise RunFileError(
                f"{name.replace('_', '-')} is {value}",
                where=where,
                remedy="Give a number from 1 on.",
            )
    options = launch.options
    rank = int(options.get("node-rank", 0))
    if not 0 <= rank < launch.nnodes:
        raise RunFileError(
            f"node-rank is {rank}, and there are {launch.nnodes} nodes, counted from 0",
            where=where,
            remedy="Correct one of them.",
        )
    if not 1 <= int(options.get("master-port", _PORT)) <= 65_535:
        raise RunFileError(
            f"master-port is {options['master-port']}", where=where, remedy="Give 1 to 65535."
        )
    if launch.slurm is not None:
        taken = options.keys() - {"max-restarts"}
        if taken:
            raise RunFileError(
                f"{min(taken)} does not go with slurm, which knows the nodes",
                where=where,
                remedy="Take it out.",
            )
    elif launch.srun:
        raise RunFileError(
            "srun has no effect without slurm", where=where, remedy="Take it out, or add slurm."
        )
    elif launch.nnodes > 1 and not options.keys() & {"master-addr", "rdzv-endpoint"}:
        raise RunFileError(
            f"nnodes is {launch.nnodes}, and nothing says where they meet",
            where=where,
            remedy="Give master-addr; or rdzv-backend c10d with rdzv-endpoint; or slurm.",
        )
    if options.get("rdzv-backend") == "c10d":
        if "rdzv-endpoint" not in options:
            raise RunFileError(
                "rdzv-backend c10d needs rdzv-endpoint", where=where, remedy="Give HOST:PORT."
            )
        both = options.keys() & {"node-rank", "master-addr", "master-port"}
        if both:
            raise RunFileError(
                f"{min(both)} has no effect with rdzv-backend c10d",
                where=where,
                remedy="Take one of them out.",
            )


class Raw(str):
    """A word that a shell is to expand; `shell_line` leaves it as it is."""

    __slots__ = ()


def shell_line(command: Sequence[str], env: Mapping[str, str], indent: str = "    ") -> str:
    """A command as one can paste it, one flag with its values a line.

    Args:
        command: Its words.
        env: Variables that it is started with.
        indent: What the further lines begin with.
    """
    first = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
    lines: list[str] = []
    words = [*first]
    for number, word in enumerate(command):
        shown = word if isinstance(word, Raw) else shlex.quote(word)
        if number and word.startswith("--"):
            lines.append(" ".join(words))
            words = [f"{indent}{shown}"]
        else:
            words.append(shown)
    return " \\\n".join([*lines, " ".join(words)])


def batch_script(
    launch: Launch, name: str, folder: Path, log: Path, env: Mapping[str, str], flags: Sequence[str]
) -> str:
    """The job that Slurm runs: one torchrun on each node.

    Args:
        launch: How the ranks start.
        name: The job's name.
        folder: Where it works.
        log: Where its output goes.
        env: Variables of the ranks.
        flags: Those of the training script.
    """
    assert launch.slurm is not None
    options = {
        "job-name": name,
        "output": str(log),
        "open-mode": "append",
        **launch.slurm,
        "nodes": str(launch.nnodes),
        "ntasks-per-node": "1",
    }
    lines = [f"#SBATCH --{key}{f'={value}' if value else ''}" for key, value in options.items()]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *lines,
            "set -euo pipefail",
            f"cd {shlex.quote(str(folder))}",
            *srun_lines(launch, env, flags),
            "",
        ]
    )


def srun_lines(launch: Launch, env: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    """The lines of a shell that start the ranks inside of a job of Slurm's."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--nnodes", str(launch.nnodes), "--nproc-per-node", str(launch.nproc_per_node)]
    torchrun += ["--node-rank", Raw('"$SLURM_NODEID"'), "--master-addr", Raw('"$MASTER_ADDR"')]
    torchrun += ["--master-port", Raw('"$MASTER_PORT"')]
    for key, value in launch.options.items():
        torchrun += [f"--{key}", value]
    inner = shell_line([*torchrun, *launch.program, *flags], {})
    srun = ["srun", "--kill-on-bad-exit=1", *launch.srun]
    return [
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        # Jobs that share a node need different ports.
        "MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))",
        "export MASTER_ADDR MASTER_PORT",
        *(f"export {key}={shlex.quote(value)}" for key, value in env.items()),
        # The number of a node is known in its own task alone, so the inner shell expands it.
        f"exec {shlex.join(srun)} bash -c {shlex.quote(f'exec {inner}')}",
    ]


def in_slurm_job() -> bool:
    """Whether this process runs inside of an allocation of Slurm's."""
    return bool(os.environ.get("SLURM_JOB_ID"))
