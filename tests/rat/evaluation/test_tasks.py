"""Tasks of lm-eval read local files in the columns of the hub, and say what they lack."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import pyarrow as pa
from datasets import Dataset
from pyarrow import parquet
from tokenizers import Tokenizer

from datamodules.tokenizer import train_tokenizer
from rat.evaluation.suites import SUITES, Job, jobs_of
from rat.evaluation.tasks import TaskLoader, _check_room

ARC = {"id": "a", "question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}
HELLASWAG = {"activity_label": "Roofing", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["x y", "z"], "label": "1"}
PIQA = {"goal": "How?", "sol1": "so", "sol2": "thus", "label": 0}
WINOGRANDE = {"sentence": "The _ was big.", "option1": "cat", "option2": "dog", "answer": "2"}
LAMBADA = {"text": "what comes last is the word"}
LONGBENCH = {"input": "Who?", "context": "A story of Ann.", "answers": ["Ann"], "all_classes": None, "length": 9}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["some words"] * 3, 260)


@pytest.fixture(scope="module")
def coarse() -> Tokenizer:
    """One that knows the words of RULER."""
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    rest = " Memorize and track the chain(s) of variable assignment hidden in the following text. Question: Find all"
    rest += " variables that are assigned the value in the text above. Answer: According to the, they are: VAR = "
    return train_tokenizer([noise + rest] * 9, 500)


@pytest.fixture
def loader(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> TaskLoader:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    return TaskLoader(tmp_path / "data", tokenizer)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))


def write_saved(path: Path, rows: list[dict[str, Any]]) -> None:
    """As save_to_disk of the datasets library leaves it, beside files that hold no rows."""
    Dataset.from_list(rows).save_to_disk(path)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_saved])
@pytest.mark.parametrize(
    ("task", "split", "row", "text", "target"),
    [
        ("arc_challenge", "validation", ARC, "Question: Which?\nAnswer:", 1),
        ("hellaswag", "validation", HELLASWAG, "Roofing: A man sits. He", 1),
        ("piqa", "validation", PIQA, "Question: How?\nAnswer:", 0),
        ("lambada_openai", "test", LAMBADA, "what comes last is the", " word"),
    ],
)
def test_rows_of_the_hub_are_read_from_files(
    loader: TaskLoader, task: str, split: str, row: dict[str, Any], text: str, target: Any, write: Callable[..., None]
) -> None:
    folder = Path(str(loader.data), task)
    folder.mkdir()
    write(folder / split, [row] * 3)
    loaded = loader.load(Job(task=task))
    assert len(loaded.eval_docs) == 3
    assert loaded.doc_to_text(loaded.eval_docs[0]) == text
    assert loaded.doc_to_target(loaded.eval_docs[0]) == target


def test_a_split_that_is_there_is_used_only_where_the_task_uses_it(loader: TaskLoader) -> None:
    folder = Path(str(loader.data), "winogrande")
    folder.mkdir()
    write_jsonl(folder / "validation", [WINOGRANDE] * 2)
    write_jsonl(folder / "test", [WINOGRANDE | {"answer": ""}] * 5)  # the hub's has no answers either
    assert len(loader.load(Job(task="winogrande")).eval_docs) == 2
    folder = Path(str(loader.data), "arc_easy")
    folder.mkdir()
    write_jsonl(folder / "validation", [ARC] * 4)
    write_jsonl(folder / "test", [ARC] * 3)
    assert len(loader.load(Job(task="arc_easy")).eval_docs) == 3


@pytest.mark.parametrize("row", [LONGBENCH, LONGBENCH | {"question": "Who?"}])
def test_longbench_is_read_in_its_own_columns_too_and_stops_at_a_new_question(
    loader: TaskLoader, row: dict[str, Any]
) -> None:
    if "question" in row:
        row = {key: value for key, value in row.items() if key != "input"}
    folder = Path(str(loader.data), "longbench_qasper")
    folder.mkdir()
    write_jsonl(folder / "test", [row])
    (job,) = [job for job in jobs_of(["longbench"], [], []) if job.task == "longbench_qasper"]
    task = loader.load(job)
    assert task.doc_to_text(task.eval_docs[0]).endswith("Article: A story of Ann.\n\n " + QASPER)
    assert task.config.generation_kwargs["until"] == ["\nQuestion"]
    assert task.config.generation_kwargs["max_gen_toks"] == 128
    assert task.process_results(task.eval_docs[0], ["Ann"])["score"] == 1
    assert loader.load(Job(task="longbench_qasper")).config.generation_kwargs["until"] == []


QASPER = (
    "Answer the question based on the above article as concisely as you can, using a single phrase or sentence if"
    ' possible. If the question cannot be answered based on the information in the article, write "unanswerable". If'
    ' the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
    "Question: Who?\n\nAnswer:"
)


def test_what_lacks_is_named(loader: TaskLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(str(loader.data), "piqa")
    folder.mkdir()
    write_jsonl(folder / "train", [PIQA])
    with pytest.raises(FileNotFoundError, match=r"piqa holds no validation.jsonl, .parquet or .arrow to evaluate on"):
        loader.load(Job(task="piqa"))
    write_parquet(folder / "validation", [PIQA])
    with pytest.raises(ValueError, match=r"piqa mixes files of several kinds \(json, parquet\)"):
        loader.load(Job(task="piqa"))
    for file in folder.iterdir():
        file.unlink()
    write_jsonl(folder / "validation", [{"goal": "x"}])
    with pytest.raises(ValueError, match="piqa holds no rows with the columns that piqa has on the hub"):
        loader.load(Job(task="piqa"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        TaskLoader(tmp_path / "nowhere", loader.tokenizer)

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"arc_easy takes its documents from the hub's allenai/ai2_arc, which cannot"):
        loader.load(Job(task="arc_easy"))

    monkeypatch.setattr(loader.manager, "load", unreachable)
    with pytest.raises(ValueError, match="niah_single_2 makes its prompts of what it downloads"):
        loader.load(Job(task="niah_single_2", length=1024))

    def no_room(*_: Any, **__: Any) -> None:
        raise ValueError("It leaves no room for the prompt template")

    monkeypatch.setattr(loader.manager, "load", no_room)
    with pytest.raises(ValueError, match="niah_single_1 makes no prompts of 16 tokens: It leaves no room"):
        loader.load(Job(task="niah_single_1", length=16))


def test_names_stand_for_tasks_groups_and_tags(loader: TaskLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader.leaves("piqa") == ["piqa"]
    assert loader.leaves("ai2_arc") == ["arc_challenge", "arc_easy"]
    assert loader.leaves("longbench_multi")[:3] == [f"longbench_{x}" for x in ("hotpotqa", "2wikimqa", "musique")]
    monkeypatch.setattr("rat.evaluation.tasks.TaskManager", lambda: loader.manager)  # all that there is: seconds
    with pytest.raises(ValueError, match="lm-eval has no task 'helaswag', did you mean 'hellaswag'"):
        loader.leaves("helaswag")
    loader.own = dict.fromkeys(SUITES["sft"].tasks, lambda _: {})
    for suite in SUITES.values():
        assert [leaf for task in suite.tasks for leaf in loader.leaves(task)] == list(suite.tasks)


@pytest.mark.parametrize("task", ["ruler_vt", "ruler_cwe"])
def test_ruler_is_not_asked_for_prompts_that_it_would_look_for_forever(
    tokenizer: Tokenizer, coarse: Tokenizer, task: str
) -> None:
    with pytest.raises(ValueError, match=f"{task} (needs prompts of [0-9]+ tokens or more|shows an example of 500)"):
        _check_room(task, 400, tokenizer)
    _check_room(task, 8192, coarse)
    with pytest.raises(ValueError, match=f"{task} needs prompts of [0-9]+ tokens or more with this tokenizer, not 400"):
        _check_room(task, 400, coarse)


@pytest.mark.slow
@pytest.mark.parametrize("task", SUITES["ruler"].tasks)
def test_ruler_makes_its_prompts_without_a_network_and_the_same_ones_again(
    loader: TaskLoader, coarse: Tokenizer, task: str
) -> None:
    loader.tokenizer = coarse
    job = Job(task=task, length=8192, suite=SUITES["ruler"])
    once = loader.load(job).eval_docs
    loader.load(Job(task=task, length=7168, suite=SUITES["ruler"]))
    assert once[:] == loader.load(job).eval_docs[:]
    assert len(once) == 500
    assert all(once["outputs"])
    assert 4096 < max(once["length"]) <= 8192 + 50  # fwe leaves no room for its answer
