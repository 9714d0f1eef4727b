"""What `predict` finds, on disk: the scores of sequences, or answers to prompts and how good they are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from tokenizers import Tokenizer
from torch import distributed

from lightning_modules.run_folder import run_folder
from lightning_modules.sharding import DataRank
from rat.evaluation.answers import SCORES, Mean, answer_scores, means

_TITLES = {"f1": "F1", "rouge_l": "ROUGE-L"}


class PredictionWriter(BasePredictionWriter):
    """Write what `predict` finds, a line of JSON for each sequence with counted targets or for each prompt, in the
    order of the data.

    Of a prompt: what its batch tells in `references`, the `prediction`, and its scores by `rat.evaluation.answers`;
    their means over each task are printed and kept beside it in scores.json and scores.md.

    Args:
        path: the file. Default: predictions.jsonl in the run's folder. Every rank beyond the first has one of its own;
            of those that share rows, one.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__("batch")
        self.path, self._writes = path, True
        self._scored: list[dict[str, Any]] = []
        self._vocabulary: Tokenizer | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file anew."""
        path, own = self.path or run_folder(trainer) / "predictions.jsonl", DataRank.of(trainer)
        self.path = path.with_suffix(f".{own.rank}.jsonl") if own.rank else path
        self._writes, self._scored = own.writes, []
        if self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, batch_indices: Any, batch: Any, *_: Any
    ) -> None:
        """Append the sequences or the answers of a batch."""
        if not self._writes:
            return
        rows = list(self._answers(trainer, prediction, batch) if "prompts" in batch else _sequences(prediction))
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are, and how good the answers of all ranks were."""
        if self._writes:
            print(f"predictions: {self.path}")
        everyone = [self._scored]
        if trainer.world_size > 1:
            everyone = [[] for _ in range(trainer.world_size)]
            distributed.all_gather_object(everyone, self._scored)
        rows = [row for scored in everyone for row in scored]
        if rows and trainer.is_global_zero:
            tasks = {
                task: means([row for row in rows if row["task"] == task]) for task in {row["task"]: 0 for row in rows}
            }
            self._report(tasks)

    def _answers(self, trainer: Trainer, prediction: Any, batch: Any) -> Iterator[dict[str, Any]]:
        if self._vocabulary is None:
            self._vocabulary = Tokenizer.from_file(str(trainer.datamodule.tokenizer_file))
        for known, tokens in zip(batch["references"], prediction["answers"], strict=True):
            ended = tokens[-1:] == [batch["eos_id"]]
            text = self._vocabulary.decode(tokens[:-1] if ended else tokens).strip()
            scores = answer_scores(text, known["answers"])
            self._scored.append({"task": known["task"], **scores})
            yield known | {"prediction": text, **scores}

    def _report(self, tasks: dict[str, dict[str, Mean]]) -> None:
        folder = self.path.parent
        plain = {task: {name: mean._asdict() for name, mean in found.items()} for task, found in tasks.items()}
        (folder / "scores.json").write_text(json.dumps(plain, indent=1) + "\n")
        table = _table(tasks)
        (folder / "scores.md").write_text(table)
        print(f"\n{table}\nscores: {folder / 'scores.json'}, {folder / 'scores.md'}")


def _sequences(prediction: Any) -> Iterator[dict[str, Any]]:
    columns = {name: values.tolist() for name, values in prediction.items()}
    for row in zip(*columns.values(), strict=True):
        named = dict(zip(columns, row, strict=True))
        if named["tokens"]:
            yield named


def _table(tasks: dict[str, dict[str, Mean]]) -> str:
    """Markdown: a row for each task, its scores in percent."""
    rows = [["task", "answers", *(_TITLES[name] for name in SCORES)], ["---"] * (2 + len(SCORES))]
    for task, found in tasks.items():
        items = next(iter(found.values())).items
        rows.append([task, f"{items:,}", *(_percent(found[name]) for name in SCORES)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _percent(mean: Mean) -> str:
    return f"{100 * mean.value:.1f}" + ("" if mean.within is None else f" ± {100 * mean.within:.1f}")
