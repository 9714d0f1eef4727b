"""evaluate takes the items of `prepare sft` and scores them as predict does, whatever the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import datasets

from datamodules.sft.examples import Examples, read_references
from datamodules.sft.prepare import prepare_sft
from datamodules.tokenizer import load_tokenizer, train_tokenizer
from rat.evaluation.scoring import RatScorer
from rat.evaluation.suites import SUITES, Job
from rat.evaluation.tasks import TaskLoader
from rat_cli.sft_tasks import SFT_TASKS

Cli = Callable[..., Any]
Loader = Callable[[], TaskLoader]
MEETING = {"input": "Who came?\nPM: Hello .", "output": "Two came. They sat."}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One whose tokens are bytes."""
    train_tokenizer(["x"], 257).save(str(tmp_path / "bytes.json"))
    return tmp_path / "bytes.json"


@pytest.fixture
def loader(tmp_path: Path, tokenizer: Path) -> Loader:
    def make() -> TaskLoader:
        (tmp_path / "data").mkdir(exist_ok=True)
        return TaskLoader(tmp_path / "data", load_tokenizer(tokenizer), SFT_TASKS)

    return make


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Write rows into data/TASK/SPLIT.jsonl; the task's folder."""

    def write(task: str, rows: list[dict[str, Any]], split: str = "test") -> Path:
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def test_the_suite_is_made_of_them() -> None:
    assert SUITES["sft"].tasks.keys() == SFT_TASKS.keys() - {"sft_jsonl"}
    assert SUITES["sft"].cut_middle


@pytest.mark.parametrize("held_out", [False, True])
def test_the_items_are_those_that_are_prepared(
    put: Callable[..., Path], loader: Loader, tokenizer: Path, tmp_path: Path, held_out: bool
) -> None:
    """Drawn from a test split, or from what training gives up; those that lack something are no items."""
    rows = [{"context": f"c{i}", "input": f"q{i}?", "answers": [f"a{i}", " b "] if i % 7 else []} for i in range(300)]
    for split in ("train",) if held_out else ("train", "test"):
        folder = put("sft_jsonl", rows, split)
    prepare_sft(tmp_path / "made", "jsonl", str(tokenizer), folder, seq_len=256)
    tests = Examples(tmp_path / "made/test")
    task = loader().load(Job(task="sft_jsonl"))
    vocabulary = load_tokenizer(tokenizer)
    assert [task.doc_to_text(doc) for doc in task.eval_docs] == [
        vocabulary.decode(tests[i][0].tolist()) for i in range(len(tests))
    ]
    known = read_references(tmp_path / "made/test", len(tests))
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [row["answers"] for row in known]
    assert len(tests) < 200 if held_out else len(tests) == 200


def test_prompts_lengths_and_scores_are_the_tasks(put: Callable[..., Path], loader: Loader) -> None:
    put("sft_qmsum", [MEETING])
    task = loader().load(Job(task="sft_qmsum"))
    (document,) = task.eval_docs
    assert task.doc_to_text(document) == "Transcript: PM: Hello .\n\nQuestion: Who came?\n\nAnswer:"
    assert task.config.generation_kwargs == {"until": [], "max_gen_toks": 384, "do_sample": False}
    found = task.process_results(document, [" two came. \n"])
    assert found["f1"] == pytest.approx(2 * 2 / (2 + 4))
    assert found["rouge_l"] == pytest.approx(2 * (1 / 2) * (1 / 4) / (1 / 2 + 1 / 4))


def test_the_answers_are_those_of_predict(
    cli: Cli, write: Callable[..., Path], put: Callable[..., Path], tiny: Path, tokenizer: Path, tmp_path: Path
) -> None:
    rows = [{"context": "some text " * i, "input": f"q{i}?", "answer": "yes"} for i in range(1, 4)]
    for split in ("train", "validation", "test"):
        folder = put("sft_jsonl", rows, split)
    prepare_sft(tmp_path / "task", "jsonl", str(tokenizer), folder, seq_len=256)
    sft = write(f"""
base: {tiny}
trainer: {{max_steps: 1}}
model:
  model: {{vocab_size: 257}}
data:
  class_path: datamodules.sft.datamodule.SFTDataModule
  init_args: {{path: {tmp_path / "task"}, seq_len: 256, batch_size: 2}}
""")
    run = tmp_path / "run/tiny"
    assert cli("fit", "--config", sft).code == 0
    assert cli("predict", "--config", sft, "--ckpt_path", "last").code == 0
    predicted = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    scores = json.loads((run / "scores.json").read_text())["jsonl"]
    result = cli(
        "evaluate", "--checkpoint", run / "model", "--tokenizer", tokenizer, "--output", tmp_path / "out",
        "--data", tmp_path / "data", "--task", "sft_jsonl",
    )  # fmt: skip
    assert result.code == 0, result.err
    answers = [json.loads(line) for line in (tmp_path / "out/answers/sft_jsonl.jsonl").read_text().splitlines()]
    assert [(row["filtered_resps"][0].strip(), row["f1"], row["rouge_l"]) for row in answers] == [
        (row["prediction"], row["f1"], row["rouge_l"]) for row in predicted
    ]
    found = json.loads((tmp_path / "out/results.json").read_text())["tasks"]["sft_jsonl"]
    assert (found["documents"], found["split"], found["version"]) == (3, "test", 1)
    assert {name: number["value"] for name, number in found["metrics"].items()} == {
        name: mean["value"] for name, mean in scores.items()
    }


def test_the_suite_cuts_the_middle_of_what_exceeds_the_training(
    cli: Cli, put: Callable[..., Path], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = {"document": {"summary": {"text": "some words"}, "text": "some text"}, "question": {"text": "What?"}}
    for name in ("summary", "text", "full"):
        put(f"sft_narrativeqa_{name}", [story | {"answers": [{"text": "some words"}, {"text": "some"}]}])
    transcript = " ".join(["some words and more words"] * 200)
    put("sft_qmsum", [{"input": f"What?\nPM: {transcript}", "output": "some words"}])
    put("sft_wikisum", [{"article": "some text", "title": "What?", "summary": "some more"}])
    vocabulary, asked = load_tokenizer(saved), {}

    def generate(self: RatScorer, rows: list[list[int]], new: int, *_: Any) -> list[list[int]]:
        asked[new] = rows[-1]
        return [vocabulary.encode(" some words").ids] * len(rows)

    monkeypatch.setattr(RatScorer, "generate", generate)
    result = cli(
        "evaluate", "--checkpoint", saved, "--output", tmp_path / "out", "--data", tmp_path / "data",
        "--suite", "sft", "--max_length", "404",
    )  # fmt: skip
    assert result.code == 0, result.err
    whole = vocabulary.encode(f"Transcript: PM: {transcript}\n\nQuestion: What?\n\nAnswer:").ids
    assert asked[384] == [*whole[:10], *whole[-10:]]
    assert vocabulary.decode(asked[128]) == "Story: some words\n\nsome text\n\nQuestion: What?\n\nAnswer:"
    assert vocabulary.decode(asked[256]) == "Article: some text\n\nQuestion: What?\n\nAnswer:"
    for line in ("| sft_narrativeqa_full | f1 | 1 |", "| sft_qmsum | rouge_l | 1 |", "| sft_wikisum | rouge_l | 0.5 |"):
        assert line in result.out
    assert "| **mean of sft NarrativeQA** | | 1 |" in result.out
    assert "| **mean of sft** | | 0.9 |" in result.out


def test_what_lacks_is_named(
    put: Callable[..., Path], loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(task: str) -> str:
        with pytest.raises(ValueError, match=task) as caught:
            loader().load(Job(task=task))
        return str(caught.value)

    assert "rows of your own: put them into FOLDER/sft_jsonl/test.jsonl" in refused("sft_jsonl")
    folder = put("sft_qmsum", [{**MEETING, "output": ""}])
    assert f"{folder} has no example to evaluate sft_qmsum on (1 have no answer)" in refused("sft_qmsum")
    put("sft_qmsum", [{"input": "Who?"}])
    assert "test.jsonl, row 1: no column 'output'" in refused("sft_qmsum")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refused("sft_wikisum")
    assert "task sft_wikisum takes its documents from the hub's d0rj/wikisum, which cannot be reached" in message
    assert message.endswith("and give --data FOLDER (Couldn't reach the Hub)")
