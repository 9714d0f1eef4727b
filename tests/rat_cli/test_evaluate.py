"""evaluate from files alone: results in every form, resumed after an interruption, and what it refuses."""

import builtins
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from datamodules.tokenizer import train_tokenizer
from rat import CausalLM, ModelConfig
from rat.evaluation.scoring import RatScorer, Request, Score
from rat.evaluation.suites import SUITES

Cli = Callable[..., Any]
GOALS = ["open a tin", "boil an egg", "cross a road", "plant a tree", "wash a cup"]
TEXT = "Question: How to open a tin or boil an egg or cross a road or plant a tree or wash a cup? Answer: so and thus"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of save_pretrained with its tokenizer."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=320, d_model=16, num_layers=2, num_heads=2, chunk_size=4, max_seq_len=64)
    CausalLM(config).save_pretrained(tmp_path / "model")
    train_tokenizer([TEXT] * 9, 300).save(str(tmp_path / "model/tokenizer.json"))
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five questions of PIQA, one of LongBench's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"goal": f"How to {goal}?", "sol1": "so and so", "sol2": f"{i} thus", "label": 0}
        for i, goal in enumerate(GOALS)
    ]
    one = {"input": "What is open?", "context": TEXT * 9, "answers": ["a tin"], "all_classes": None}
    for name, split, content in (("piqa", "validation", rows), ("longbench_hotpotqa", "test", [one])):
        (tmp_path / "data" / name).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / "data" / name / f"{split}.jsonl").write_text(lines)
    return tmp_path / "data"


@pytest.fixture
def run(cli: Cli, saved: Path, data: Path, tmp_path: Path) -> Cli:
    def evaluate(*arguments: str | Path) -> Any:
        return cli("evaluate", "--checkpoint", saved, "--output", tmp_path / "out", "--data", data, *arguments)

    return evaluate


def piqa(saved: Path) -> float:
    """The accuracy, by the loss of each solution alone."""
    from datamodules.tokenizer import load_tokenizer

    model, vocabulary = CausalLM.from_pretrained(saved).eval(), load_tokenizer(saved)
    right = 0
    for i, goal in enumerate(GOALS):
        context = f"Question: How to {goal}?\nAnswer:"
        losses = []
        for solution in ("so and so", f"{i} thus"):
            ids = torch.tensor([vocabulary.encode(f"{context} {solution}").ids])
            labels = ids.roll(-1, 1)
            labels[:, : len(vocabulary.encode(context).ids) - 1] = -100
            labels[:, -1] = -100
            losses.append(model(ids, labels).item() * int((labels != -100).sum()))
        right += losses[0] < losses[1]
    return right / len(GOALS)


def test_results_are_printed_and_kept(run: Cli, saved: Path, tmp_path: Path) -> None:
    result = run("--task", "[piqa, longbench_hotpotqa]")
    assert result.code == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["tasks"]["piqa"]["metrics"]["acc"]["value"] == pytest.approx(piqa(saved))
    assert (found["tasks"]["piqa"]["documents"], found["tasks"]["piqa"]["split"]) == (5, "validation")
    assert found["settings"]["checkpoint"] == str(saved)
    table = (tmp_path / "out/results.md").read_text()
    assert table in result.out
    assert table.count("\n") == 2 + 2 + 2  # a heading, and two metrics of each
    assert len((tmp_path / "out/answers/piqa.jsonl").read_text().splitlines()) == 5
    assert not list((tmp_path / "out").glob("unfinished*"))
    assert list((tmp_path / "out/tensorboard").glob("events.out.tfevents.*"))


def test_an_interrupted_evaluation_goes_on_where_it_was(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Request] = []
    score_batch = RatScorer.score_batch

    def counting(self: RatScorer, requests: Sequence[Request]) -> list[Score]:
        if len(scored) == 6 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        scored.extend(requests)
        return score_batch(self, requests)

    monkeypatch.setattr(RatScorer, "score_batch", counting)
    options = ("--task", "piqa", "--batch_size", "2")
    assert run(*options).code == 130
    assert len(scored) == 6
    assert run(*options).code == 0
    assert len(scored) == len({(tuple(a), tuple(b)) for a, b in scored}) == 10
    assert run(*options).code == 0
    assert len(scored) == 10
    shutil.rmtree(tmp_path / "out" / "answers")
    assert run("--task", "piqa", "--limit", "2").err.startswith(f"error: {tmp_path / 'out'} holds results of other")


def test_prompts_are_whole_unless_the_suite_keeps_to_what_the_model_was_trained_on(
    run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts: list[list[int]] = []
    monkeypatch.setattr(
        RatScorer, "generate", lambda self, rows, *_: (prompts.extend(map(list, rows)), [[5]] * len(rows))[1]
    )
    monkeypatch.setattr(
        "rat.evaluation.suites.SUITES",
        SUITES | {"longbench": replace(SUITES["longbench"], groups={"QA": {"longbench_hotpotqa": "score"}})},
    )
    assert run("--task", "longbench_hotpotqa").code == 0
    shutil.rmtree(tmp_path / "out")
    assert run("--suite", "longbench").code == 0
    whole, cut = prompts
    assert len(whole) > 64
    assert cut == [*whole[:16], *whole[-16:]]  # and 32 tokens of an answer


def test_a_transformers_model_is_evaluated_the_same_way(
    cli: Cli, saved: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=320, **sizes))
    model.save_pretrained(tmp_path / "llama")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json"), eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path / "llama")
    out = tmp_path / "out"
    result = cli("evaluate", "--checkpoint", tmp_path / "llama", "--output", out, "--data", data, "--task", "piqa")
    assert result.code == 0
    assert json.loads((out / "results.json").read_text())["tasks"]["piqa"]["documents"] == 5


def test_what_cannot_be_evaluated_is_told_at_once(
    run: Cli, cli: Cli, saved: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str | Path) -> str:
        result = run(*arguments)
        assert result.code == 1
        return result.err

    assert "nothing to evaluate" in refused()
    assert "batch_size must be at least 1, got 0" in refused("--task", "piqa", "--batch_size", "0")
    assert "there is no suite 'comonsense', did you mean 'commonsense'" in refused("--suite", "comonsense")
    long = refused("--task", "piqa", "--max_length", "9", "--long_prompts", "refuse")
    assert "exceed max_length 9: raise it" in long
    shutil.copytree(saved, tmp_path / "wide")
    assert "there is no device 'tpu'" in refused("--task", "piqa", "--device", "tpu")
    (saved / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "give --tokenizer FILE" in refused("--task", "piqa")
    other = tmp_path / "wide"
    (other / "config.json").write_text(
        json.dumps(json.loads((other / "config.json").read_text()) | {"pattern": ["rnn"]})
    )
    result = cli("evaluate", "--checkpoint", other, "--output", tmp_path / "o", "--data", data, "--task", "piqa")
    assert result.code == 1
    assert "does not fit the model" in result.err
    (other / "config.json").write_text('{"model_type": "another"}')
    result = cli("evaluate", "--checkpoint", other, "--output", tmp_path / "o", "--data", data, "--task", "piqa")
    assert (result.code, "error: transformers loads no language model" in result.err) == (1, True)


def test_without_lm_eval_the_extra_is_named(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "lm_eval":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    result = run("--task", "piqa")
    assert (result.code, result.err) == (1, "error: evaluation needs lm-eval: pip install 'rat-lab[eval]'\n")
