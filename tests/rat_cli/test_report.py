"""What `report` prints of a run that was really trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.baselines import collect_pairs, ngram_baselines
from datamodules.tokens import TokenDataModule

Cli = Callable[..., Any]


@pytest.fixture
def run(cli: Cli, tiny: Path, tmp_path: Path) -> Path:
    assert cli("fit", "--config", tiny).code == 0
    return tmp_path / "run" / "tiny"


def rows(out: str) -> dict[str, list[str]]:
    table = out.partition("validation")[2].splitlines()[1:4]
    return {line[:24].strip(): line[24:].split() for line in table}


def test_the_run_stands_beside_n_grams_of_what_it_saw(cli: Cli, run: Path, random_shards: Path) -> None:
    out = cli("report", "--run", run).out
    assert "trained on " in out
    data = TokenDataModule(random_shards, seq_len=16, batch_size=4)
    batches = iter(data.train_dataloader())
    seen = collect_pairs([next(batches), next(batches)])  # two steps of four samples
    expected = ngram_baselines(seen, collect_pairs(data.val_dataloader()), 64)
    curves = EventAccumulator(str(run))
    curves.Reload()
    trained = curves.Scalars("val/perplexity")[-1].value
    found = rows(out)
    for name, value in (("unigram", expected.unigram), ("interpolated bigram", expected.bigram)):
        assert float(found[name][0]) == pytest.approx(value, abs=0.006)
    name = next(name for name in found if name.startswith("tiny ("))
    assert float(found[name][0]) == pytest.approx(trained, abs=0.006)
    bits = float(torch.tensor(trained).log2()) / 3  # three bytes a token
    assert float(found[name][1]) == pytest.approx(bits, abs=0.0006)
    assert f"trained on {len(seen.targets):,} tokens" in out
    assert f"tensorboard --logdir {run}" in out
    assert "no sample: there is no tokenizer.json" in out


def test_a_sample_where_there_is_a_tokenizer(cli: Cli, tiny: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"Return the number {i}, and the one after it. " * 20)
    data = tmp_path / "data"
    given = ["--output", data, "--source", texts, "--vocab_size", "300", "--held_out", "0.3"]
    assert cli("prepare", "pretrain", *given).code == 0
    extra = write(f"model: {{model: {{vocab_size: 300}}}}\ndata: {{init_args: {{path: {data}}}}}\n")
    assert cli("fit", "--config", tiny, "--config", extra).code == 0
    first, again, other = (
        cli("report", "--run", tmp_path / "run" / "tiny", "--seed", seed).out for seed in ("1", "1", "2")
    )
    assert "sample: Return the" in first
    assert first == again != other


def test_what_is_no_finished_run(cli: Cli, run: Path, tmp_path: Path) -> None:
    result = cli("report", "--run", tmp_path / "nowhere")
    assert result.code == 1
    assert result.err.startswith(f"error: {tmp_path / 'nowhere' / 'config.yaml'} is missing")
    for events in run.glob("events.*"):
        events.unlink()
    result = cli("report", "--run", run)
    assert result.code == 1
    assert f"{run} holds no event files of TensorBoard" in result.err
