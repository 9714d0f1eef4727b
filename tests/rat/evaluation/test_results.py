"""Results: intervals, means of suites, tables, what stays in the folder, and what may not be mixed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rat.evaluation.results import ResultFolder, metric_numbers
from rat.evaluation.suites import SUITES, Job, jobs_of


def result(metric: str, value: float, stderr: float | None, **others: float) -> dict[str, Any]:
    numbers = {metric: value, **others}
    return {
        "documents": 4,
        "metrics": {name: {"value": x, "stderr": stderr, "interval": None} for name, x in numbers.items()},
    }


def test_standard_errors_are_lm_evals_or_those_of_a_mean() -> None:
    found = {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.2, "score,none": 2.0, "score_stderr,none": "N/A"}
    samples = [{"acc": 1.0, "score": 1.0}, {"acc": 0.0, "score": 3.0}, {"acc": 0.0, "score": -1}, {"acc": 0.0}]
    numbers = metric_numbers(found | {"4096,none": -1, "4096_stderr,none": "N/A"}, samples)
    assert list(numbers) == ["acc", "score"]  # of 4096 there is no document
    assert (numbers["acc"]["value"], numbers["acc"]["stderr"]) == (0.25, 0.2)
    assert numbers["score"]["stderr"] == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert numbers["score"]["interval"] == pytest.approx([2 - 1.96, 2 + 1.96])


def test_intervals_are_those_of_shares_of_logarithms_and_of_means() -> None:
    # Wilson's for 0 of 10 and 3 of 10, from any table of it.
    for right, low, high in ((0, 0.0, 0.2775), (3, 0.1078, 0.6032)):
        samples = [{"acc": float(i < right)} for i in range(10)]
        (number,) = metric_numbers({"acc,none": right / 10, "acc_stderr,none": 0.1}, samples).values()
        assert number["interval"] == pytest.approx([low, high], abs=1e-4)
    samples = [{"perplexity": -3.0}, {"perplexity": -2.0}]
    (number,) = metric_numbers({"perplexity,none": 10.0, "perplexity_stderr,none": 5.0}, samples).values()
    assert number["interval"] == pytest.approx([10 / math.exp(0.98), 10 * math.exp(0.98)])
    (number,) = metric_numbers({"acc,none": 1.0, "acc_stderr,none": "N/A"}, [{"acc": 1.0}]).values()
    assert (number["stderr"], number["interval"]) == (None, None)


def test_a_finished_suite_has_a_mean_in_every_form(tmp_path: Path) -> None:
    jobs = jobs_of(["commonsense"], ["boolq"], [])
    folder = ResultFolder(tmp_path, {"model": "m"})
    folder.begin()
    for i, job in enumerate(jobs):
        assert folder.finished(job) is None
        sample = {"doc_id": 0, "target": "a", "filtered_resps": [[-1.0, True]], "metrics": ["acc"], "acc": 1, "doc": {}}
        folder.add(job, result(job.metric or "acc", i / 10, 0.1, other=0.5), [sample])
        if i == 3:
            assert "mean of" not in folder.finish(jobs)
    table = folder.finish(jobs)
    assert table == (tmp_path / "results.md").read_text()
    assert "| arc_challenge | acc_norm | 0.1 | " in table
    assert "|  | other | 0.5 | " in table
    within = 1.96 * 0.1 / math.sqrt(6)
    assert f"| **mean of commonsense** | | 0.25 | {0.25 - within:.4g} to {0.25 + within:.4g} | 6 tasks |" in table
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["settings"] == {"model": "m"}
    assert saved["tasks"]["boolq"] == folder.finished(jobs[-1])
    assert saved["means"]["commonsense"]["value"] == pytest.approx(0.25)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(curves.Scalars("evaluate/piqa/acc/value")) == 1  # though it was finished twice
    assert curves.Scalars("evaluate/piqa/acc/value")[0].value == pytest.approx(0.4)
    assert curves.Scalars("evaluate/mean/commonsense")[0].value == pytest.approx(0.25)
    answers = json.loads((tmp_path / "answers" / "piqa.jsonl").read_text())
    assert answers == {key: sample[key] for key in ("doc_id", "target", "filtered_resps", "metrics", "acc")}


def test_means_are_taken_by_group_and_by_length(tmp_path: Path) -> None:
    jobs = [*jobs_of(["ruler"], [], [1024, 2048]), *jobs_of(["longbench"], [], [])]
    folder = ResultFolder(tmp_path, {})
    folder.begin()
    for job in jobs:
        if job.task != "longbench_lcc" and (job.task, job.length) != ("ruler_vt", 2048):
            folder.add(job, result("score", 0.5 if job.length else 0.25, 0.0), [])
    folder.finish(jobs)
    means = json.loads((tmp_path / "results.json").read_text())["means"]
    groups = ["single-document QA", "multi-document QA", "summarisation", "few-shot"]
    assert {name: mean["value"] for name, mean in means.items()} == dict.fromkeys(groups, 0.25) | {"ruler@1024": 0.5}


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    ResultFolder(tmp_path, {"model": "b", "limit": 5})  # refused before it began
    ResultFolder(tmp_path, {"model": "a", "limit": None}).begin()
    ResultFolder(tmp_path, {"model": "a", "limit": None})
    with pytest.raises(ValueError, match=r"other settings \(limit is None, not 5\): choose another --output"):
        ResultFolder(tmp_path, {"model": "a", "limit": 5})


def test_jobs_come_once_and_by_length() -> None:
    names = [job.name for job in jobs_of(["commonsense", "ruler"], ["piqa", "ruler_vt", "niah_single_2"], [1024, 4096])]
    assert len(names) == len(set(names)) == 6 + 6 * 2 + 2
    assert {"piqa", "ruler_vt@1024", "niah_single_2@4096"} <= set(names)
    assert [len(suite.tasks) for suite in SUITES.values()] == [6, 14, 6, 5]
    assert Job(task="x").name == "x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "nothing to evaluate: give --suite commonsense, longbench, ruler, sft or --task NAME"),
        ((["comonsense"], [], []), "there is no suite 'comonsense', did you mean 'commonsense'"),
        ((["sums"], [], []), "there is no suite 'sums': choose from commonsense, longbench, ruler, sft"),
        ((["ruler"], [], [0]), r"lengths must be at least 1 token, got \[0\]"),
    ],
)
def test_wrong_names_are_told(arguments: tuple[list[str], list[str], list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs_of(*arguments)
