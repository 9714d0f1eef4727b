"""Runs tasks of lm-eval one after the other, and keeps what each has found at once."""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

from lm_eval.api.model import CachingLM
from lm_eval.evaluator import evaluate
from tqdm import tqdm

from rat.evaluation.harness import RatLM
from rat.evaluation.results import ResultFolder, metric_numbers
from rat.evaluation.suites import Job
from rat.evaluation.tasks import TaskLoader

# Of documents drawn anew, for the standard error of what is no mean, such as perplexity.
_DRAWS = 1000


def run_jobs(
    lm: RatLM,
    jobs: Sequence[Job],
    loader: TaskLoader,
    results: ResultFolder,
    limit: int | None = None,
    num_fewshot: int | None = None,
    trained_length: int | None = None,
) -> str:
    """Run every task that is not finished; the Markdown table of all.

    What a task was asked is kept answer by answer, so that one that was interrupted goes on where it was.

    Args:
        lm: the model.
        jobs: the tasks.
        loader: gives their documents.
        results: where they go.
        limit: documents of each task, from its first; default: all.
        num_fewshot: examples before each document; default: as many as the task says.
        trained_length: tokens that the model was trained on at a time; suites that cut the middle of prompts keep to
            it where `lm.max_length` says nothing.

    Raises:
        ValueError: as `TaskLoader` and `RatLM`.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap would start a process for every core
    jobs = list({job.name: job for one in jobs for job in _leaves(one, loader)}.values())
    left = [job for job in jobs if results.finished(job) is None]
    # All of them first, so that one without documents is told before time is spent.
    tasks = {job.name: loader.load(job) for job in tqdm(left, desc="documents")}
    results.begin()
    given = lm.max_length, lm.long_prompts
    for job in (bar := tqdm(left, desc="tasks")):
        bar.set_postfix_str(job.name)
        if job.suite is not None and job.suite.cut_middle:
            lm.max_length, lm.long_prompts = lm.max_length or trained_length, "middle"
        result, samples = _run(lm, job, tasks.pop(job.name), str(results.cache), limit, num_fewshot)
        results.add(job, result, samples)
        lm.max_length, lm.long_prompts = given
    return results.finish(jobs)


def _leaves(job: Job, loader: TaskLoader) -> list[Job]:
    return [replace(job, task=leaf) for leaf in loader.leaves(job.task)]


def _run(
    lm: RatLM, job: Job, task: Any, cache: str, limit: int | None, num_fewshot: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    shots = task.get_config("num_fewshot") or 0 if num_fewshot is None else num_fewshot
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    begun = time.perf_counter()
    with redirect_stdout(StringIO()):
        found = evaluate(
            CachingLM(lm, f"{cache}_rank0.db"),
            {"tasks": {job.task: task}, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=_DRAWS,
        )
    samples = found["samples"][job.task]
    metrics = metric_numbers(found["results"][job.task], samples)
    if job.length is not None:  # RULER calls the share of answers that stand in the text by the prompt's length
        metrics = {"string_match": metrics[str(job.length)]}
    result = {
        "task": job.task,
        "length": job.length,
        "split": task.config.test_split or task.config.validation_split,
        "documents": len(samples),
        "num_fewshot": shots,
        "version": found["versions"][job.task],
        "metrics": metrics,
        "seconds": round(time.perf_counter() - begun, 3),
    }
    return result, samples
