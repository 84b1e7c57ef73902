"""Tasks of lm-evaluation-harness under several conditions, compared document by document.

Tasks, few-shot examples, metrics and their errors are the harness's own; the model is its `HFLM`
with a prefix after BOS (`harness_model`). All conditions answer the same documents, so the standard
error of a difference is computed from the paired differences per document, which is much smaller
than the two separate errors suggest. Metrics that are not means over documents (corpus BLEU,
perplexity) have no paired error. Runs in one process, on one GPU or the CPU.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.inference.paired import mean_and_error
from megatron_meco.wording import one_line


class TaskError(MeCoError):
    """A task that the harness does not know, or cannot load."""


Document = tuple[str, int]
"""A task of the harness, and the number of a document in it."""

Scores = dict[str, dict[Document, float]]
"""A value per document for each metric that is a mean over documents."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of one task.

    Attributes:
        metric: The harness's name, with its filter unless that is `none`.
        num_documents: Number of documents; 0 if the metric is not a mean over them.
        plain: Without metadata.
        plain_stderr: Its standard error, or None if the harness has none.
        conditioned: With metadata, or None without a prefix.
        conditioned_stderr: Its standard error.
        difference: Conditioned minus plain.
        difference_stderr: Standard error of the paired difference, or None if the metric is not a
            mean over documents.
    """

    metric: str
    num_documents: int
    plain: float
    plain_stderr: float | None
    conditioned: float | None = None
    conditioned_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The result of one task and one number of examples.

    Attributes:
        task: Name of the task, which may be part of a tag.
        num_fewshot: Examples before each question; None for a group whose tasks differ.
        prefix: The prefix; empty without metadata.
        num_cut: Number of requests that were too long and cut, by condition.
        comparisons: Its metrics.
        run: What was evaluated to get it.
        scores: Values per document, by condition.
    """

    task: str
    num_fewshot: int | None
    prefix: str
    num_cut: dict[str, int]
    comparisons: list[Comparison] = field(default_factory=list)
    # Not part of the result: a task that fixes its examples gives equal results for two runs.
    run: Run | None = field(default=None, compare=False, repr=False)
    scores: dict[str, Scores] = field(default_factory=dict, compare=False, repr=False)

    def report(self) -> dict[str, Any]:
        """Return the result for a JSON file, without what is kept for comparisons."""
        row = asdict(replace(self, run=None, scores={}))
        del row["run"], row["scores"]
        return row


@dataclass(frozen=True, kw_only=True)
class Run:
    """An evaluation of the harness.

    Attributes:
        name: The task, group or tag.
        num_fewshot: Examples that were asked for, or None for the task's own number.
        limit: Documents of each task (1 or more), or a share of them, or None for all.
    """

    name: str
    num_fewshot: int | None = None
    limit: float | None = None


# ---- Numbers ----


def mean_of_independent(rows: Sequence[Comparison]) -> dict[str, float | None]:
    """Return the mean over tasks, each with the same weight, and its errors.

    Args:
        rows: One metric of each task; the tasks share no documents.

    Returns:
        `plain`, `conditioned`, `difference` and the `_stderr` of each; None where a task has none.
    """
    found: dict[str, float | None] = {}
    for name in ("plain", "conditioned", "difference"):
        values = [getattr(row, name) for row in rows]
        errors = [getattr(row, f"{name}_stderr") for row in rows]
        found[name] = None if None in values else math.fsum(values) / len(rows)
        found[f"{name}_stderr"] = None if None in errors else math.hypot(*errors) / len(rows)
    return found


def compare(
    name: str, plain: Mapping[str, Any], conditioned: Mapping[str, Any] | None
) -> list[Comparison]:
    """Put two evaluations of a task side by side.

    Args:
        name: The task or group.
        plain: What the harness returned without metadata, samples included.
        conditioned: The same with metadata, or None.
    """
    found = []
    for label, metric, rule in _metrics(name, plain):
        value, before = _value_and_scores(name, plain, metric, rule)
        one = Comparison(
            metric=label,
            num_documents=len(before),
            plain=value,
            plain_stderr=_stderr(name, plain, metric, rule),
        )
        if conditioned is not None:
            other, after = _value_and_scores(name, conditioned, metric, rule)
            error = None
            if before and before.keys() == after.keys():
                error = mean_and_error([after[k] - before[k] for k in before])[1]
            one = Comparison(
                **{
                    **asdict(one),
                    "conditioned": other,
                    "conditioned_stderr": _stderr(name, conditioned, metric, rule),
                    "difference": other - one.plain,
                    "difference_stderr": None if error is None or math.isnan(error) else error,
                }
            )
        found.append(one)
    return found


def scores_of(name: str, results: Mapping[str, Any]) -> Scores:
    """Return the values per document of a task's metrics, from what the harness returned."""
    scores = {}
    for label, metric, rule in _metrics(name, results):
        scores[label] = _value_and_scores(name, results, metric, rule)[1]
    return {label: values for label, values in scores.items() if values}


def _metrics(name: str, results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield our label, the metric and the filter of each number of a task."""
    for key, value in results["results"][name].items():
        metric, comma, rule = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            yield metric if rule == "none" else f"{metric} ({rule})", metric, rule


def _value_and_scores(
    name: str, results: Mapping[str, Any], metric: str, rule: str
) -> tuple[float, dict[Document, float]]:
    """Return a metric and, if it is the mean over documents, their values; else no values."""
    reported = float(results["results"][name][f"{metric},{rule}"])
    values = {
        (leaf, sample["doc_id"]): float(sample[metric])
        for leaf in _leaves(name, results)
        for sample in results["samples"][leaf]
        if sample["filter"] == rule and _is_number(sample.get(metric))
    }
    if not values or not math.isclose(
        math.fsum(values.values()) / len(values), reported, rel_tol=1e-9, abs_tol=1e-12
    ):
        return reported, {}
    return reported, values


def _leaves(name: str, results: Mapping[str, Any]) -> list[str]:
    if name in results["samples"]:
        return [name]
    return [leaf for part in results["group_subtasks"][name] for leaf in _leaves(part, results)]


def _stderr(name: str, results: Mapping[str, Any], metric: str, rule: str) -> float | None:
    value = results["results"][name].get(f"{metric}_stderr,{rule}")
    return float(value) if _is_number(value) and not math.isnan(value) else None


def _is_number(value: Any) -> bool:
    # numpy's scalars are registered as neither int nor float, but convert.
    return not isinstance(value, (str, tuple, list, dict, type(None)))


# ---- Evaluating ----


class Evaluation:
    """Tasks of the harness, loaded and ready.

    Args:
        tasks: Names of tasks, groups or tags; `*` as in a shell.
        include_path: A folder with task definitions of the user's.

    Attributes:
        names: The tasks, groups and tags that were meant.

    Raises:
        TaskError: For an unknown task.
    """

    def __init__(self, tasks: Iterable[str], include_path: Path | None = None) -> None:
        from lm_eval.tasks import TaskManager

        if include_path is not None and not include_path.is_dir():
            raise FlagError(
                "no such folder",
                where=f"--include-path {include_path}",
                remedy="Name the folder that holds the YAML files of your tasks.",
            )
        try:
            self._manager = TaskManager(include_path=str(include_path) if include_path else None)
        # The user's files may raise any exception.
        except Exception as error:
            raise FlagError(
                f"its tasks cannot be read ({one_line(error)})",
                where=f"--include-path {include_path}",
                remedy="Correct the YAML files in it.",
            ) from error
        self.names = [name for task in tasks for name in self._match(task)]

    def load(self, name: str) -> dict[str, Any]:
        """Load one of `names` with its data, as the harness's `TaskManager.load` does.

        Raises:
            TaskError: If its definition or its data cannot be loaded.
        """
        try:
            loaded: dict[str, Any] = self._manager.load([name])
        # A task runs its author's templates and functions.
        except Exception as error:
            settings = getattr(self._manager.task_index.get(name), "cfg", None) or {}
            data_set = settings.get("dataset_path")
            of_data = f"its data set {data_set!r}" if data_set else "its data"
            raise TaskError(
                f"{of_data} cannot be loaded ({one_line(error)})",
                where=f"task {name!r}",
                remedy="A data set that is not in the cache of the `datasets` library is fetched "
                "from its hub: run once with network access, or leave the task out.",
            ) from error
        return loaded

    @staticmethod
    def run(
        model: Any,
        loaded: dict[str, Any],
        num_fewshot: int | None,
        limit: float | None,
        samples: dict[str, list[int]] | None = None,
    ) -> dict[str, Any]:
        """Evaluate with the harness.

        The harness's `simple_evaluate` without its work per call: loading the tasks, and seconds of
        describing the machine.

        Args:
            model: A `MeCoLM`.
            loaded: What `load` returned, for this number of examples alone.
            num_fewshot: Examples before each question, or None for the task's own number.
            limit: Documents of each task (1 or more), or a share of them, or None for all.
            samples: Document numbers of each task in place of a limit, or None.

        Returns:
            What the harness's `evaluate` returns, samples included.

        Raises:
            TaskError: If the harness refuses the task.
        """
        from lm_eval import evaluate
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.utils import set_torch_seed

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        set_torch_seed(DEFAULT_OTHER_SEED)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            # As in the harness: a task whose definition says 0 keeps 0.
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        try:
            results: dict[str, Any] = evaluate(
                lm=model, task_dict=loaded, limit=limit, samples=samples
            )
        except (MeCoError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise TaskError(
                f"lm-evaluation-harness refuses it ({one_line(error)})",
                where=f"task {', '.join(loaded['tasks'])}",
                remedy="Leave the task out, or give it another --num-fewshot.",
            ) from error
        return results

    def _match(self, task: str) -> list[str]:
        matched: list[str] = self._manager.match_tasks([task])
        if not matched:
            near = difflib.get_close_matches(task, self._manager.all_tasks, n=5)
            raise TaskError(
                f"unknown task {task!r}",
                where="--tasks",
                remedy=f"Near it: {', '.join(near)}."
                if near
                else "`lm_eval ls tasks` lists them; tasks of your own need --include-path.",
            )
        return matched


def open_evaluation(tasks: Iterable[str], include_path: Path | None) -> Evaluation:
    """Look tasks up in lm-evaluation-harness.

    Args:
        tasks: Names of tasks, groups or tags.
        include_path: A folder with the user's own task definitions, or None.

    Raises:
        FlagError: If the harness is not installed.
        TaskError: For an unknown task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise FlagError(
            "lm-evaluation-harness is not installed",
            where="--tasks",
            remedy="Install it: pip install 'megatron-meco[eval]'.",
        )
    # They log every overwritten default and every retried download.
    for name in ("lm_eval", "huggingface_hub", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return Evaluation(tasks, include_path)


def evaluate_task(
    evaluation: Evaluation,
    model: Any,
    name: str,
    prefix: str,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
) -> list[TaskResult]:
    """Evaluate one task without metadata and, where there is a prefix, with it.

    Args:
        evaluation: Holds the task.
        model: A `MeCoLM`.
        name: A task, a group or a tag.
        prefix: The rendered prefix; empty: without metadata only.
        num_fewshot: Examples before each question, or None for the task's own number.
        limit: Documents of each task (1 or more), or the share of them.

    Returns:
        The result of a task or group, or that of each task under a tag.

    Raises:
        TaskError: If its data cannot be loaded.
        RequestError: If a request cannot be answered with the prefix.
    """
    loaded = evaluation.load(name)
    cut, results = {}, {}
    for condition, text in (("plain", ""), ("conditioned", prefix)):
        if condition == "plain" or prefix:
            model.condition_on(text)
            results[condition] = evaluation.run(model, loaded, num_fewshot, limit)
            cut[condition] = model.num_cut
    plain = results["plain"]
    return [
        TaskResult(
            task=task,
            num_fewshot=_shots(task, plain),
            prefix=prefix,
            num_cut=cut,
            comparisons=compare(task, plain, results.get("conditioned")),
            run=Run(name=name, num_fewshot=num_fewshot, limit=limit),
            scores={condition: scores_of(task, found) for condition, found in results.items()},
        )
        for task in _reported(name, plain)
    ]


def evaluate_shuffled(
    evaluation: Evaluation, model: Any, run: Run, wrong: Mapping[Document, str]
) -> tuple[dict[str, Scores], int]:
    """Repeat an evaluation, each document behind the prefix of another one.

    Args:
        evaluation: Holds the task.
        model: A `MeCoLM`.
        run: What to repeat.
        wrong: The prefix of each document. Others have none.

    Returns:
        The values per document of each task, and the number of requests that were cut.
    """
    model.condition_on("", wrong)
    loaded = evaluation.load(run.name)
    results = evaluation.run(model, loaded, run.num_fewshot, run.limit)
    return {task: scores_of(task, results) for task in _reported(run.name, results)}, model.num_cut


def _reported(name: str, results: Mapping[str, Any]) -> list[str]:
    """A tag, or a group without an aggregate, is reported as its tasks."""
    if any("," in key for key in results["results"].get(name, {})):
        return [name]
    return [key for key in results["results"] if key in results["samples"]]


def _shots(name: str, results: Mapping[str, Any]) -> int | None:
    shots = {results["n-shot"][leaf] for leaf in _leaves(name, results)}
    return shots.pop() if len(shots) == 1 else None
