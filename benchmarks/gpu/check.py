"""`make gpu-check`: show on one GPU that everything works there, and how fast.

    make gpu-check ARGS="--minutes 9"      # as far as that goes; run again to go on
    make gpu-check ARGS=--rehearse         # everything at toy size on the CPU, before going there

Stages: `tests` (tests/gpu), `speed-SIZE` (lanes.py, in the launchers' own configuration on one
GPU), `borders` (what empty places in cu_seqlens cost). Each is a process of its own, is kept in
--state when it is done, and is not run again for the same files and machine. A report of all
finished stages is written to --output as JSON and Markdown after each.

Ends with 0 when all is done and passed, 1 when something failed, 3 when stages are left over.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import markdown, summarise

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPARED = ["baseline", "conditioned", "cooldown", "split", "best-fit"]
ALL_LANES = [*COMPARED, "one-document", "no-documents"]
BORDERS = [f"borders-{n}" for n in (65, 129, 257, 513, 1025)]
LEFT_OVER = 3

# A model that a CPU trains in seconds, in the launchers' variables.
TOY = {
    "MECO_NUM_LAYERS": "2",
    "MECO_HIDDEN_SIZE": "64",
    "MECO_FFN_HIDDEN_SIZE": "128",
    "MECO_NUM_ATTENTION_HEADS": "2",
    "MECO_NUM_QUERY_GROUPS": "2",
    "MECO_TRANSFORMER_IMPL": "local",
    "OMP_NUM_THREADS": "1",
}

_FACTS = """
import importlib.metadata, json, platform, torch
def engine():
    try:
        import transformer_engine.pytorch
    except Exception:  # A broken one is as good as none.
        return None
    return version("transformer-engine") or version("transformer_engine_torch")
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
gpu = torch.cuda.is_available()
print(json.dumps({
    "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
    "memory_GiB": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if gpu else 0,
    "cuda": torch.version.cuda,
    "torch": torch.__version__,
    "transformer_engine": engine(),
    "megatron_core": version("megatron-core"),
    "python": platform.python_version(),
    "gpu": gpu,
}))
"""


class StageFailed(Exception):
    """What a stage says when it could not be done."""


@dataclass(frozen=True)
class Context:
    """What stages need to know.

    Attributes:
        facts: Of the machine.
        state: Folder of finished stages, logs and scratch files.
        rehearse: Whether everything is at toy size on the CPU.
    """

    facts: dict[str, Any]
    state: Path
    rehearse: bool


@dataclass(frozen=True)
class Stage:
    """A part of the check.

    Attributes:
        run: Does it, within so many seconds.
        expected: Seconds that it takes, about; it is not begun with less.
    """

    run: Callable[[Context, float], dict[str, Any]]
    expected: int


def run_process(
    command: list[str], log: Path, seconds: float, variables: dict[str, str] | None = None
) -> int:
    """Run a command with all its children, ended after so many seconds.

    Raises:
        StageFailed: When the time ran out.
    """
    environment = {**os.environ, **(variables or {})}
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part
    )
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise StageFailed(f"not done after {seconds:.0f} seconds; see {log}") from error
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[bytes], patience: float = 15) -> None:
    """End a process and what it started, so that nothing stays on the device."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        # torchrun puts its ranks into sessions of their own, and ends them when it is asked to.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path, number: int = 15) -> str:
    """The end of a log, for an error message."""
    return "\n".join("    " + line for line in log.read_text().splitlines()[-number:])


def run_tests(context: Context, seconds: float) -> dict[str, Any]:
    """The tests that need a device; in a rehearsal the CPU takes its place."""
    log, xml_file = context.state / "tests.log", context.state / "tests.xml"
    xml_file.unlink(missing_ok=True)
    # Files side by side: most of a test is importing Megatron.
    processes = "0" if context.rehearse else "4"
    # What other libraries warn of on this host is not what is tested here.
    command = [sys.executable, "-m", "pytest", "-W", "ignore", "-m", "gpu", "-v", "-rP"]
    command += ["tests/gpu"]
    command += ["-n", processes, "--dist", "loadfile", f"--junit-xml={xml_file}"]
    run_process(command, log, seconds, {"MECO_REHEARSE": "1"} if context.rehearse else None)
    if not xml_file.exists():
        raise StageFailed(f"pytest did not finish; see {log}\n{last_lines(log)}")
    tests = []
    for case in xml.etree.ElementTree.parse(xml_file).iter("testcase"):
        outcome = next((c.tag for c in case if c.tag in ("failure", "error", "skipped")), "passed")
        tests.append({"name": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome})
    failed = sum(test["outcome"] in ("failure", "error") for test in tests)
    return {"tests": tests, "failed": failed + (not tests)}


def speed_stage(
    size: str, lanes: list[str], rounds: int, *, local: bool = False, flags: str = ""
) -> Callable[[Context, float], dict[str, Any]]:
    """A stage that trains the paper's model of a size on these lanes in turn."""

    def run(context: Context, seconds: float) -> dict[str, Any]:
        begun = time.monotonic()
        toy = context.rehearse
        # The vocabulary of the paper's models, whatever the tokenizer made here knows.
        vocab_size = 4096 if toy else 128_256
        corpus = context.state / "corpus"
        write_corpus(context, corpus, vocab_size, seconds)
        num_rounds = 5 if toy else rounds
        name = f"{size}-{'local' if local else 'default'}-{len(lanes)}"
        output = context.state / f"steps-{name}.json"
        output.unlink(missing_ok=True)
        engine = context.facts["transformer_engine"] and not local
        variables = {
            "MECO_PYTHON": sys.executable,
            "MECO_TRAIN_SCRIPT": str(HERE / "alternate.py"),
            "MECO_TRANSFORMER_IMPL": "transformer_engine" if engine else "local",
            "MECO_DATA_PATH": str(corpus / "corpus"),
            "MECO_TOKENIZER_MODEL": str(corpus / "tokenizer"),
            "MECO_DATA_CACHE": str(context.state / "cache"),
            "MECO_OUTPUT": str(context.state / "run"),
            "MECO_SPLIT": "1,0,0",
            # Lanes have their own phases.
            "MECO_COOLDOWN_FRACTION": "0",
            "GPUS_PER_NODE": "1",
            "MECO_GLOBAL_BATCH_SIZE": "4",
            "MECO_TRAIN_ITERS": str(num_rounds * len(lanes) + 1),
            "MECO_LOG_INTERVAL": "1000000",
            "MASTER_PORT": str(free_port()),
        }
        if toy:
            variables |= (
                TOY
                | {"CUDA_VISIBLE_DEVICES": ""}
                | {"MECO_SEQ_LENGTH": "256" if "borders-65" not in lanes else "2048"}
            )
        more = f"--bench-rounds {num_rounds} --bench-output {output} --bench-lanes"
        command = ["bash", str(ROOT / "examples" / f"train_llama_{size}.sh"), "--"]
        command += ["--make-vocab-size-divisible-by", str(vocab_size), *shlex.split(flags)]
        command += [*shlex.split(more), *lanes]
        log = context.state / f"speed-{name}.log"
        remaining = seconds - (time.monotonic() - begun)
        status = run_process(command, log, remaining, variables)
        if status or not output.exists():
            raise StageFailed(f"training ended with status {status}; see {log}\n{last_lines(log)}")
        return summarise(json.loads(output.read_text()), context.facts["device"])

    return run


def write_corpus(context: Context, folder: Path, vocab_size: int, seconds: float) -> None:
    """The corpus of all speed stages."""
    size = "--documents 400 --median 40 --longest 1000"
    if not context.rehearse:
        size = "--documents 60000 --median 600 --longest 200000"
    log = context.state / "corpus.log"
    command = [sys.executable, "-W", "ignore", str(HERE / "corpus.py"), str(folder), *size.split()]
    if run_process([*command, "--vocab-size", str(vocab_size)], log, seconds):
        raise StageFailed(f"no corpus; see {log}\n{last_lines(log)}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_stages(facts: dict[str, Any]) -> dict[str, Stage]:
    """The stages in their order; the local layers are timed too where they are not the default."""
    stages = {
        "tests": Stage(run_tests, 300),
        "speed-600m": Stage(speed_stage("600m", ALL_LANES, 23), 200),
        "speed-1.6b": Stage(speed_stage("1.6b", ALL_LANES, 18), 300),
        "borders": Stage(
            speed_stage("600m", BORDERS, 13, flags="--meco-max-documents-per-pack 0"), 180
        ),
    }
    if facts["transformer_engine"]:
        local = speed_stage("600m", ["conditioned", "cooldown", "no-documents"], 13, local=True)
        stages["speed-600m-local"] = Stage(local, 180)
    return stages


def main() -> int:
    """Run what is left, report what is there."""
    args = parse_arguments()
    begun = time.monotonic()
    facts = json.loads(
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _FACTS],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    if not facts.pop("gpu") and not args.rehearse:
        print(
            f"gpu-check: error: torch {facts['torch']} finds no GPU here. Run it on a host with "
            "one; --rehearse runs everything at toy size on the CPU.",
            file=sys.stderr,
        )
        return 1
    facts |= {"commit": commit(), "sources": sources()}
    kind = "rehearsal" if args.rehearse else "gpu"
    context = Context(facts, args.state.resolve() / kind, args.rehearse)
    context.state.mkdir(parents=True, exist_ok=True)
    output = args.output or (context.state if args.rehearse else HERE / "results")
    stages = make_stages(facts)
    chosen = args.stages or list(stages)
    if unknown := [name for name in chosen if name not in stages]:
        print(
            f"gpu-check: error: --stages {' '.join(unknown)}: unknown here. "
            f"Choose from: {' '.join(stages)}.",
            file=sys.stderr,
        )
        return 1
    failed, left = [], []
    for name in chosen:
        kept = context.state / f"{name}.json"
        if not args.again and finished(kept, facts):
            print(f"gpu-check: {name}: done before", flush=True)
            continue
        remaining = 60 * args.minutes - (time.monotonic() - begun)
        if remaining < (30 if args.rehearse else stages[name].expected):
            left.append(name)
            continue
        print(f"gpu-check: {name}: begun, {remaining:.0f} seconds left", flush=True)
        stage_begun = time.monotonic()
        try:
            result = stages[name].run(context, remaining)
        except StageFailed as error:
            print(f"gpu-check: {name}: failed: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        record = {"facts": facts, "seconds": time.monotonic() - stage_begun, "result": result}
        kept.write_text(json.dumps(record))
        write_report(context, stages, output)
        print(f"gpu-check: {name}: done in {record['seconds']:.0f} seconds", flush=True)
    report = write_report(context, stages, output)
    if report is not None:
        print(report.read_text())
        print(f"gpu-check: written to {report} and {report.with_suffix('.json')}")
    for name in chosen:
        kept = context.state / f"{name}.json"
        if finished(kept, facts) and json.loads(kept.read_text())["result"].get("failed"):
            failed.append(name)
    if failed:
        print(f"gpu-check: failed: {' '.join(dict.fromkeys(failed))}", file=sys.stderr)
        return 1
    if left:
        print(f"gpu-check: left over: {' '.join(left)}. Run it again to go on.")
        return LEFT_OVER
    return 0


def finished(kept: Path, facts: dict[str, Any]) -> bool:
    """Whether a stage was done on this machine at this commit."""
    return kept.exists() and json.loads(kept.read_text())["facts"] == facts


def write_report(context: Context, stages: dict[str, Stage], folder: Path) -> Path | None:
    """Write JSON and Markdown of all finished stages; returns the latter's path."""
    done = {}
    for name in stages:
        kept = context.state / f"{name}.json"
        if finished(kept, context.facts):
            record = json.loads(kept.read_text())
            done[name] = {"seconds": record["seconds"], "result": record["result"]}
    if not done:
        return None
    results = {
        "rehearsal": context.rehearse,
        "date": datetime.date.today().isoformat(),
        "machine": context.facts,
        "stages": done,
    }
    folder.mkdir(parents=True, exist_ok=True)
    device = "-".join(context.facts["device"].replace("/", " ").split()).lower()
    kind = "rehearsal-" if context.rehearse else ""
    path = folder / f"{kind}{device}-{context.facts['commit']}"
    path = path.with_name(path.name + ".md")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.write_text(markdown(results))
    return path


def commit() -> str:
    """The commit that is checked, with a mark where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or os.environ.get("MECO_COMMIT", "unknown")


def sources() -> str:
    """A digest of all that is checked: a commit alone does not tell of changed files."""
    digest = hashlib.sha256()
    for folder in ("megatron_meco", "csrc", "examples", "benchmarks/gpu", "tests/gpu"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh", ".cpp", ".h"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gpu-check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these")
    parser.add_argument("--minutes", type=float, default=60, help="end by then; default: 60")
    parser.add_argument("--again", action="store_true", help="also what was done before")
    parser.add_argument("--rehearse", action="store_true", help="at toy size on the CPU")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="of the reports; default: benchmarks/gpu/results, of a rehearsal --state",
    )
    parser.add_argument(
        "--state", type=Path, default=ROOT / "build" / "gpu-check", metavar="DIR", help="of stages"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
