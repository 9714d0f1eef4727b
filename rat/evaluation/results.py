"""What evaluations found: a file for each task as it is finished, one for all, a table, and curves for TensorBoard."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rat.evaluation.answers import WITHIN
from rat.evaluation.suites import SUITES, Job

RESULTS, TABLE, SETTINGS = "results.json", "results.md", "settings.json"
_TASKS, _ANSWERS, _CURVES = "tasks", "answers", "tensorboard"


class ResultFolder:
    """A folder of results of one model with one set of settings; what is finished in it stays.

    Args:
        folder: made by `begin` where it is missing.
        settings: plain values that change results; the model is one of them.

    Raises:
        ValueError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)
        file = folder / SETTINGS
        if file.is_file():
            before = json.loads(file.read_text())
            keys = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
            if keys:
                changed = "; ".join(f"{key} is {before.get(key)}, not {self.settings.get(key)}" for key in keys)
                raise ValueError(f"{folder} holds results of other settings ({changed}): choose another --output")

    def begin(self) -> None:
        """Make the folder one of these settings; a call that is refused before leaves it free for others."""
        for name in (_TASKS, _ANSWERS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _write(self.folder / SETTINGS, self.settings)

    @property
    def cache(self) -> Path:
        """Where single answers are kept until their task is finished, by lm-eval's naming."""
        return self.folder / "unfinished"

    def finished(self, job: Job) -> dict[str, Any] | None:
        """The result of a task that is finished."""
        file = self.folder / _TASKS / f"{job.name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def add(self, job: Job, result: dict[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep a task's result, and what the model answered to each document."""
        keys = ("doc_id", "target", "filtered_resps", "metrics")
        lines = [{key: row[key] for key in (*keys, *row["metrics"])} for row in samples]
        text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
        (self.folder / _ANSWERS / f"{job.name}.jsonl").write_text(text)
        _write(self.folder / _TASKS / f"{job.name}.json", result)

    def finish(self, jobs: Sequence[Job]) -> str:
        """Write everything that is finished as JSON, as a Markdown table and for TensorBoard; the table."""
        results = {job.name: found for job in jobs if (found := self.finished(job)) is not None}
        means = _means(jobs, results)
        _write(self.folder / RESULTS, {"settings": self.settings, "tasks": results, "means": means})
        table = _table(jobs, results, means)
        (self.folder / TABLE).write_text(table)
        shutil.rmtree(self.folder / _CURVES, ignore_errors=True)
        with SummaryWriter(str(self.folder / _CURVES)) as writer:  # type: ignore[no-untyped-call]
            for name, found in results.items():
                for metric, number in found["metrics"].items():
                    for part in ("value", "stderr"):
                        if number[part] is not None:
                            writer.add_scalar(f"evaluate/{name}/{metric}/{part}", number[part], 0)  # type: ignore[no-untyped-call]
            for name, mean in means.items():
                writer.add_scalar(f"evaluate/mean/{name}", mean["value"], 0)  # type: ignore[no-untyped-call]
        self.cache.with_name(f"{self.cache.name}_rank0.db").unlink(missing_ok=True)
        return table


def metric_numbers(found: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The metrics of a task with standard errors and 95 % intervals, from what lm-eval made of them.

    A metric for which lm-eval gives no standard error gets that of the mean over its documents; -1 stands for documents
    that a metric does not count (RULER's, of other lengths).
    """
    numbers: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        metric, comma, _ = key.partition(",")
        counted = [row[metric] for row in samples if metric in row and row[metric] != -1]
        if not comma or metric.endswith("_stderr") or not counted or not isinstance(value, int | float):
            continue
        error = found.get(key.replace(metric, f"{metric}_stderr", 1))
        if not isinstance(error, int | float) and all(isinstance(x, int | float) for x in counted):
            error = stdev(counted) / math.sqrt(len(counted)) if len(counted) > 1 else None
        if not isinstance(error, int | float) or not math.isfinite(error):
            error = None
        interval = None if error is None else _interval(metric, value, error, counted)
        numbers[metric] = {"value": value, "stderr": error, "interval": interval}
    return numbers


def _interval(metric: str, value: float, error: float, counted: Sequence[Any]) -> list[float]:
    """95 %: Wilson's where documents are right or wrong, which knows that none of few right is not never; of a normal
    distribution else, for perplexities of their logarithm."""
    if all(x in (0, 1) for x in counted):
        n, z = len(counted), WITHIN**2 / len(counted)
        middle = (value + z / 2) / (1 + z)
        within = WITHIN * math.sqrt(value * (1 - value) / n + z / (4 * n)) / (1 + z)
        return [max(0.0, middle - within), min(1.0, middle + within)]
    if metric == "perplexity" and len(counted) > 1:  # lm-eval keeps a log-likelihood for each document
        factor = math.exp(min(WITHIN * stdev(counted) / math.sqrt(len(counted)), 300.0))
        return [value / factor, value * factor]
    return [value - WITHIN * error, value + WITHIN * error]


def counting(job: Job, result: Mapping[str, Any]) -> str:
    """The metric of a result that counts."""
    metrics = list(result["metrics"])
    return job.metric if job.metric in metrics else metrics[0]


def _means(jobs: Sequence[Job], results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The mean of the metric that counts, over each suite, and each group of tasks in it, that is finished."""
    means: dict[str, dict[str, Any]] = {}
    for name, suite in SUITES.items():
        lengths = list(dict.fromkeys(job.length for job in jobs if job.suite is suite))
        for length in lengths:
            suffix = "" if length is None else f"@{length}"
            groups = suite.groups if len(suite.groups) > 1 else {}
            for label, tasks in {**groups, name: suite.tasks}.items():
                mean = _mean([job for job in jobs if job.suite is suite and job.length == length], tasks, results)
                if mean is not None:
                    means[label + suffix] = mean
    return means


def _mean(jobs: Sequence[Job], tasks: Mapping[str, str], results: Mapping[str, Any]) -> dict[str, Any] | None:
    own = {
        job.task: results[job.name]["metrics"][counting(job, results[job.name])] for job in jobs if job.name in results
    }
    if any(task not in own for task in tasks):
        return None
    errors = [own[task]["stderr"] for task in tasks]
    known = None not in errors and any(errors)  # all of them 0 says little: nothing, or everything, of few
    value, error = fmean(own[task]["value"] for task in tasks), math.hypot(*errors) / len(errors) if known else None
    within = None if error is None else [value - WITHIN * error, value + WITHIN * error]
    return {"value": value, "stderr": error, "interval": within, "tasks": len(tasks)}


def _table(jobs: Sequence[Job], results: Mapping[str, Any], means: Mapping[str, Any]) -> str:
    lines = ["| task | metric | value | 95 % interval | documents |", "|---|---|---|---|---|"]
    for job in jobs:
        if job.name not in results:
            continue
        result = results[job.name]
        head = counting(job, result)
        for metric in [head, *(other for other in result["metrics"] if other != head)]:
            number = result["metrics"][metric]
            name = job.name if metric == head else ""
            lines.append(f"| {name} | {metric} | {_cells(number)} | {result['documents']} |")
    for name, mean in means.items():
        lines.append(f"| **mean of {name}** | | {_cells(mean)} | {mean['tasks']} tasks |")
    return "\n".join(lines) + "\n"


def _cells(number: Mapping[str, Any]) -> str:
    interval = number["interval"]
    return f"{number['value']:.4g} | " + ("" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}")


def _write(file: Path, content: Any) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, file)
