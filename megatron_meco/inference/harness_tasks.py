"""Tasks of lm-evaluation-harness, without metadata and with it, and what it changes.

Tasks, few-shot examples, metrics and their errors are the harness's own; the model is its `HFLM`
with a prefix after BOS (`harness`). Both conditions answer the same documents, so the error of
their difference comes from the differences document by document: much smaller than what the two
errors by themselves suggest. Costs two evaluations, with the model and the tasks loaded once. What
was given up: several processes (one GPU, or the CPU), and errors of differences of metrics that
are no means over documents (corpus BLEU, perplexity).
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_meco.errors import FlagError, MeCoError
from megatron_meco.wording import one_line


class TaskError(MeCoError):
    """A task that the harness does not know, or cannot load."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of one task.

    Attributes:
        metric: The harness's name, with the filter where it is not `none`.
        num_documents: Documents behind it; 0 where the harness keeps no value for each.
        plain: Without metadata.
        plain_stderr: Its standard error; None: the harness has none.
        conditioned: With metadata; None: there was none to condition on.
        conditioned_stderr: Its standard error.
        difference: Conditioned minus plain.
        difference_stderr: Standard error of the paired difference; None: no mean over documents.
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
    """What came out for one task and one number of examples.

    Attributes:
        task: Its name.
        num_fewshot: Examples before each question; None for a group whose tasks differ.
        prefix: What the model was conditioned on; empty: nothing.
        num_cut: Requests too long for the model, by condition.
        comparisons: Its metrics.
    """

    task: str
    num_fewshot: int | None
    prefix: str
    num_cut: dict[str, int]
    comparisons: list[Comparison] = field(default_factory=list)


# ---- Numbers ----


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; not a number from fewer than two values."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def mean_of_independent(rows: Sequence[Comparison]) -> dict[str, float | None]:
    """The mean over tasks, each with the same weight, and its errors.

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
        conditioned: The same with metadata; None: not done.
    """
    found = []
    for key, value in plain["results"][name].items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        before = _values(name, plain, metric, rule, value)
        one = Comparison(
            metric=metric if rule == "none" else f"{metric} ({rule})",
            num_documents=len(before),
            plain=float(value),
            plain_stderr=_stderr(name, plain, metric, rule),
        )
        if conditioned is not None:
            other = float(conditioned["results"][name][key])
            after = _values(name, conditioned, metric, rule, other)
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


def _values(
    name: str, results: Mapping[str, Any], metric: str, rule: str, reported: float
) -> dict[tuple[str, int], float]:
    """A value for each document, when the reported one is their mean; else nothing."""
    values = {
        (leaf, sample["doc_id"]): float(sample[metric])
        for leaf in _leaves(name, results)
        for sample in results["samples"][leaf]
        if sample["filter"] == rule and _is_number(sample.get(metric))
    }
    if not values or not math.isclose(
        math.fsum(values.values()) / len(values), reported, rel_tol=1e-9, abs_tol=1e-12
    ):
        return {}
    return values


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
        # The files are the user's, and may fail in any way.
        except Exception as error:
            raise FlagError(
                f"its tasks cannot be read ({one_line(error)})",
                where=f"--include-path {include_path}",
                remedy="Mend the YAML files in it.",
            ) from error
        self.names = [name for task in tasks for name in self._match(task)]

    def load(self, name: str) -> dict[str, Any]:
        """Load a task with its data.

        Args:
            name: One of `names`.

        Returns:
            What the harness's `TaskManager.load` returns.

        Raises:
            TaskError: When its definition or its data cannot be had.
        """
        try:
            loaded: dict[str, Any] = self._manager.load([name])
        # A task runs templates and functions of its author's.
        except Exception as error:
            settings = getattr(self._manager.task_index.get(name), "cfg", None) or {}
            data_set = settings.get("dataset_path")
            of_data = f"its data set {data_set!r}" if data_set else "its data"
            raise TaskError(
                f"{of_data} cannot be loaded ({one_line(error)})",
                where=f"task {name!r}",
                remedy="A data set that is not in the cache of the `datasets` library is fetched "
                "from its hub: run once with a network, or leave the task out.",
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

        As its `simple_evaluate`, less what that does once for each call and not for each model: it
        loads the tasks and spends seconds on describing the machine.

        Args:
            model: A `MeCoLM`.
            loaded: What `load` returned, for this number of examples alone.
            num_fewshot: Examples before each question; None: as the task says.
            limit: Documents of each task (1 or more), or the share of them; None: all.
            samples: Numbers of the documents of each task, instead of a limit; None: all.

        Returns:
            What the harness's `evaluate` returns, samples included.

        Raises:
            TaskError: When the harness refuses the task.
        """
        from lm_eval import evaluate
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.utils import set_torch_seed

        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        set_torch_seed(DEFAULT_OTHER_SEED)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            # As the harness has it: a task whose definition says 0 keeps it.
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
    # Their notes on every overwritten default and every retried download drown the table.
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
        num_fewshot: Examples before each question; None: as the task says.
        limit: Documents of each task (1 or more), or the share of them.

    Returns:
        The result of a task or group, or that of each task under a tag.

    Raises:
        TaskError: When its data cannot be had.
        RequestError: When it cannot be answered with the prefix.
    """
    loaded = evaluation.load(name)
    cut, results = {}, {}
    for condition, text in (("plain", ""), ("conditioned", prefix)):
        if condition == "plain" or prefix:
            model.condition_on(text)
            results[condition] = evaluation.run(model, loaded, num_fewshot, limit)
            cut[condition] = model.num_cut
    plain = results["plain"]
    # A group without a figure of its own, and a tag, stand for their tasks.
    has_own = any("," in key for key in plain["results"].get(name, {}))
    shown = [name] if has_own else [key for key in plain["results"] if key in plain["samples"]]
    return [
        TaskResult(
            task=task,
            num_fewshot=_shots(task, plain),
            prefix=prefix,
            num_cut=cut,
            comparisons=compare(task, plain, results.get("conditioned")),
        )
        for task in shown
    ]


def _shots(name: str, results: Mapping[str, Any]) -> int | None:
    shots = {results["n-shot"][leaf] for leaf in _leaves(name, results)}
    return shots.pop() if len(shots) == 1 else None
