"""predict answers the prompts of a fine-tuning task, and tells how well."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.sft.prepare import prepare_sft
from datamodules.tokenizer import train_tokenizer

Cli = Callable[..., Any]


def test_a_test_set_is_answered_and_scored(cli: Cli, write: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    train_tokenizer(["x"], 257).save(str(tmp_path / "bytes.json"))
    for split in ("train", "validation", "test"):
        rows = [{"context": split, "input": f"q{i}?", "answer": "yes"} for i in range(3)]
        write("".join(json.dumps(row) + "\n" for row in rows), f"rows/{split}.jsonl")
    prepare_sft(
        tmp_path / "task", "jsonl", str(tmp_path / "bytes.json"), tmp_path / "rows", seq_len=64, max_new_tokens=4
    )
    sft = write(f"""
base: {tiny}
model:
  model: {{vocab_size: 257}}
data:
  class_path: datamodules.sft.datamodule.SFTDataModule
  init_args: {{path: {tmp_path / "task"}, seq_len: 64, batch_size: 2}}
""")
    assert cli("fit", "--config", sft).code == 0
    result = cli("predict", "--config", sft, "--ckpt_path", "last")
    assert result.code == 0, result.err
    run = tmp_path / "run" / "tiny"
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [(row["task"], row["index"], row["input"], row["answers"]) for row in rows] == [
        ("jsonl", i, f"q{i}?", ["yes"]) for i in range(3)
    ]
    assert (run / "scores.md").read_text() in result.out
    assert json.loads((run / "scores.json").read_text())["jsonl"]["f1"]["items"] == 3
