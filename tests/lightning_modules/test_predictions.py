"""Answers to prompts: what generation gives, how they are scored and told, on one rank and on two."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from ranks import together
from tokenizers import Tokenizer

from datamodules.sft.datamodule import SFTDataModule
from datamodules.sft.examples import Examples
from datamodules.sft.prepare import prepare_sft
from datamodules.tokenizer import train_tokenizer
from lightning_modules import FSDP2Strategy, LanguageModel, PredictionWriter, Throughput
from rat import ModelConfig
from rat.evaluation.answers import answer_scores, means

CONFIG = ModelConfig(vocab_size=257, d_model=16, num_layers=2, num_heads=2, chunk_size=4, max_seq_len=64, init_std=0.4)
COUNT, NEW = 7, 9


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven test examples in tokens that are bytes, with one or two answers."""
    folder = tmp_path_factory.mktemp("sft")
    train_tokenizer(["x"], 257).save(str(folder / "bytes.json"))
    (folder / "rows").mkdir()
    for split, count in (("train", 2), ("validation", 2), ("test", COUNT)):
        rows = [
            {"context": "c" * i + split, "input": f"q{i}?", "answers": ["é or so", "or"][: 1 + i % 2]}
            for i in range(1, count + 1)
        ]
        (folder / "rows" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_sft(
        folder / "data", "jsonl", str(folder / "bytes.json"), folder / "rows", seq_len=64, max_new_tokens=NEW,
        chunk_size=4,
    )  # fmt: skip
    return folder / "data"


def predict(prepared: Path, folder: Path, *more: Any, strategy: Any = "auto", devices: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, callbacks=[PredictionWriter(folder / "found.jsonl"), *more],
    )  # fmt: skip
    module = LanguageModel(CONFIG)
    data = SFTDataModule(prepared, seq_len=64, batch_size=2, **options)
    return module, trainer.predict(module, data)


def read(*paths: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_answers_are_those_of_generation_with_their_scores(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, predicted = predict(prepared, tmp_path, Throughput(2))
    rows, examples = read(tmp_path / "found.jsonl"), Examples(prepared / "test")
    vocabulary = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    prompts = [examples[i][0] for i in range(COUNT)]
    answers = [answer for batch in predicted for answer in batch["answers"]]
    assert answers == module.model.generate(prompts, max_new_tokens=NEW, eos_token_id=examples.eos_id)
    assert len({tuple(answer) for answer in answers}) > 3
    for i, (row, tokens) in enumerate(zip(rows, answers, strict=True)):
        references = ["é or so", "or"][: 1 + (i + 1) % 2]
        text = vocabulary.decode([token for token in tokens if token != examples.eos_id]).strip()
        known = {"task": "jsonl", "index": i, "input": f"q{i + 1}?", "answers": references, "prediction": text}
        assert row == known | answer_scores(text, references)
    expected = means([{name: row[name] for name in ("f1", "rouge_l")} for row in rows])
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "jsonl": {name: mean._asdict() for name, mean in expected.items()}
    }
    shown = capsys.readouterr().out
    table = (tmp_path / "scores.md").read_text()
    assert f"predictions: {tmp_path / 'found.jsonl'}\n\n{table}" in shown
    f1, rouge = (f"{100 * mean.value:.1f} ± {100 * mean.within:.1f}" for mean in expected.values())
    assert table.splitlines()[-1] == f"| jsonl | 7 | {f1} | {rouge} |"


def test_right_answers_score_one_and_tasks_stand_apart(tmp_path: Path, prepared: Path) -> None:
    vocabulary = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.datamodule = SFTDataModule(prepared, seq_len=64)  # type: ignore[attr-defined]
    writer = PredictionWriter(tmp_path / "found.jsonl")
    writer.on_predict_start(trainer, LanguageModel(CONFIG))
    for task, answers in (("one", ["yes é", "yes"]), ("two", ["no", "no"]), ("one", ["x", "yes é"])):
        references = [{"task": task, "index": i, "input": "?", "answers": [answers[0]]} for i in range(2)]
        batch = {"prompts": [None, None], "references": references, "eos_id": 256}
        tokens = [[*vocabulary.encode(f" {answers[0]}").ids, 256], vocabulary.encode(answers[1]).ids]
        writer.write_on_batch_end(trainer, LanguageModel(CONFIG), {"answers": tokens}, None, batch, 0, 0)
    writer.on_predict_end(trainer, LanguageModel(CONFIG))
    assert [row["prediction"] for row in read(tmp_path / "found.jsonl")] == ["yes é", "yes", "no", "no", "x", "yes é"]
    scores = json.loads((tmp_path / "scores.json").read_text())
    # 1, 2/3 of one word of two, then 1, 0
    assert list(scores) == ["one", "two"]
    assert scores["one"]["f1"] == {
        "value": pytest.approx((1 + 2 / 3 + 1 + 0) / 4),
        "within": pytest.approx(0.4620, abs=1e-3),
        "items": 4,
    }
    assert scores["two"]["f1"] == {"value": 1.0, "within": 0.0, "items": 2}


def test_the_length_of_answers_may_be_given(prepared: Path, tmp_path: Path) -> None:
    _, whole = predict(prepared, tmp_path)
    _, cut = predict(prepared, tmp_path, max_new_tokens=2)
    assert [a[:2] for batch in whole for a in batch["answers"]] == [a for batch in cut for a in batch["answers"]]


def test_the_scores_are_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = PredictionWriter(tmp_path / "found.jsonl")
    writer._scored = [{"task": "one", "f1": 0.5, "rouge_l": 0.25}]

    def gather(everyone: list[Any], own: Any) -> None:
        everyone[:] = [own, [{"task": "one", "f1": 0.0, "rouge_l": 0.75}]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for first in (False, True):
        trainer: Any = SimpleNamespace(world_size=2, is_global_zero=first)
        writer.on_predict_end(trainer, LanguageModel(CONFIG))
        assert (tmp_path / "scores.json").exists() == first
    assert "| one | 2 | 25.0 ± 49.0 | 50.0 ± 49.0 |" in capsys.readouterr().out


def test_models_that_devices_share_answer_no_prompts() -> None:
    module = LanguageModel(CONFIG)
    module.trainer = Trainer(accelerator="cpu", devices=1, strategy=FSDP2Strategy(), logger=False)
    with pytest.raises(ValueError, match=r"prompts are answered by whole models: take .* cli.py convert --to file"):
        module.predict_step({"prompts": [torch.tensor([1])], "eos_id": 0, "max_new_tokens": 1}, 0)


def on_two_ranks(prepared: Path, folder: Path) -> None:
    predict(prepared, folder, strategy=DDPStrategy(), devices=2)
    with pytest.raises(ValueError, match=r"prompts are answered by whole models: take .* cli.py convert --to file"):
        predict(prepared, folder / "refused", strategy=FSDP2Strategy(), devices=2)


@pytest.mark.slow
def test_two_ranks_find_what_one_does_and_sharded_models_are_refused(prepared: Path, tmp_path: Path) -> None:
    predict(prepared, tmp_path / "alone")
    together(2, on_two_ranks, prepared, tmp_path / "two")
    alone = read(tmp_path / "alone" / "found.jsonl")
    both = [read(tmp_path / "two" / name) for name in ("found.jsonl", "found.1.jsonl")]
    assert [[row["index"] for row in rows] for rows in both] == [[0, 1, 4, 5], [2, 3, 6]]
    assert sorted(both[0] + both[1], key=lambda row: row["index"]) == alone
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("alone", "two")]
    assert scores[1]["jsonl"]["f1"] == pytest.approx(scores[0]["jsonl"]["f1"])
