"""The fine-tuning tasks as tasks of lm-eval: the items of `prepare sft`, and the scores of `predict`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datamodules.sft.prepare import HELD_OUT, SEED, TEST_ITEMS, usable_examples
from datamodules.sft.sources import ExampleSource
from datamodules.sft.tasks import Task, find_task
from datamodules.text_sources import SourceError
from rat.evaluation.answers import SCORES, answer_scores


def sft_task(name: str, task: Task, folder: Path | None) -> dict[str, Any]:
    """A fine-tuning task as a configuration of lm-eval.

    Args:
        name: by which it is asked for.
        task: its prompts and answers.
        folder: holds its rows, as `ExampleSource` reads them; None takes those of the hub.

    Raises:
        ValueError: the hub has none.
    """
    if folder is None and task.hub is None:
        raise ValueError(
            f"task {name} is for rows of your own: put them into FOLDER/{name}/test.jsonl (or .parquet, .arrow) and"
            " give --data FOLDER"
        )
    return {
        "task": name,
        "dataset_path": task.hub,
        "custom_dataset": partial(_documents, name, task, folder),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answers",
        "process_results": _scores,
        "generation_kwargs": {"until": [], "max_gen_toks": task.max_new_tokens, "do_sample": False},
        "metric_list": [{"metric": score, "aggregation": "mean", "higher_is_better": True} for score in SCORES],
        "metadata": {"version": 1},
    }


def _documents(name: str, task: Task, folder: Path | None, **_: Any) -> dict[str, Any]:
    """Rows {prompt, answers} of the examples that `prepare sft` draws to test on."""
    # imported here: evaluation alone needs it
    from datasets import Dataset

    counts: Counter[str] = Counter()
    try:
        source = ExampleSource(task, folder, HELD_OUT, needed="test")
        examples = list(usable_examples(source, "test", TEST_ITEMS, SEED, counts))
    except SourceError as error:
        if folder is None and error.__cause__ is not None:
            raise ConnectionError(error.__cause__) from None
        raise
    if not examples:
        why = ", ".join(f"{count} have {lack}" for lack, count in counts.items()) or "there is none"
        raise ValueError(f"{folder or task.hub} has no example to evaluate {name} on ({why})")
    return {"test": Dataset.from_list([{"prompt": task.prompt(one), "answers": one.answers} for one in examples])}


def _scores(document: Mapping[str, Any], texts: Sequence[str]) -> dict[str, float]:
    return answer_scores(texts[0].strip(), document["answers"])


SFT_TASKS = {
    name: partial(sft_task, name, task)
    for name, task in {
        "sft_narrativeqa_summary": find_task("narrativeqa", "summary"),
        "sft_narrativeqa_text": find_task("narrativeqa", "text"),
        "sft_narrativeqa_full": find_task("narrativeqa", "full"),
        "sft_qmsum": find_task("qmsum"),
        "sft_wikisum": find_task("wikisum"),
        "sft_jsonl": find_task("jsonl"),
    }.items()
}
