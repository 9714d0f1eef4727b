"""generate from files, into files, and with a text that was read before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.tokenizer import load_tokenizer
from rat import CausalLM
from rat.session import Session

Cli = Callable[..., Any]
ROWS = [{"id": i, "prompt": prompt} for i, prompt in enumerate(["words", "more of some", "ä", "text text", "and"])]
SAMPLED = ["--max_new_tokens", "6", "--temperature", "0.9", "--seed", "3", "--stop_at_end_of_text", "false"]
GREEDY = [*SAMPLED[:2], "--temperature", "0", *SAMPLED[-2:]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_of_a_file_stand_in_its_order(cli: Cli, saved: Path, prompts: Path, tmp_path: Path) -> None:
    result = cli(
        "generate", "--checkpoint", saved, "--prompts_file", prompts, "--output", tmp_path / "found.jsonl", *GREEDY,
        "--batch_size", "2",
    )  # fmt: skip
    assert (result.code, result.out) == (0, f"5 answers: {tmp_path / 'found.jsonl'}\n"), result.err
    found = read(tmp_path / "found.jsonl")
    assert [{name: row[name] for name in ("id", "prompt")} for row in found] == ROWS
    for row in found:
        alone = cli("generate", "--checkpoint", saved, "--prompt", row["prompt"], *GREEDY)
        assert alone.out == row["prompt"] + row["completion"] + "\n"


def test_batches_draw_for_themselves(cli: Cli, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("words\n" * 4)
    options = ["--prompts_file", tmp_path / "same.txt", "--output", tmp_path / "found.jsonl", "--batch_size", "2"]
    assert cli("generate", "--checkpoint", saved, *options, *SAMPLED).code == 0
    assert len({row["completion"] for row in read(tmp_path / "found.jsonl")}) == 4


def test_an_interrupted_call_is_gone_on_with(
    cli: Cli, saved: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    options = ["generate", "--checkpoint", saved, "--prompts_file", prompts, *SAMPLED, "--batch_size", "2", "--output"]
    assert cli(*options, whole).code == 0
    made, generate = [], CausalLM.generate

    def interrupted(model: CausalLM, batch: Any, **given: Any) -> list[list[int]]:
        made.append(len(batch))
        if len(made) == 2:
            raise KeyboardInterrupt
        return generate(model, batch, **given)

    monkeypatch.setattr(CausalLM, "generate", interrupted)
    assert cli(*options, again).code == 130
    assert not again.exists()
    other = cli(*options, again, "--seed", "4")
    assert (other.code, "again.jsonl.partial was begun with seed=3: remove it" in other.err) == (1, True)
    assert cli(*options, again).code == 0
    assert made == [2, 2, 2, 1]
    assert again.read_bytes() == whole.read_bytes()
    repeated = cli(*options, again)
    assert (repeated.code, "again.jsonl exists: choose another --output" in repeated.err) == (1, True)


def test_a_long_prompt_is_read_once(
    cli: Cli, saved: Path, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, state = "some words and more words of some text" * 3, tmp_path / "state"
    common = ["generate", "--checkpoint", saved, *GREEDY]
    result = cli(*common, "--prompt", long, "--max_new_tokens", "0", "--save_state", state)
    assert (result.code, result.out) == (0, long + "\n")
    vocabulary, model = load_tokenizer(saved), CausalLM.from_pretrained(saved)
    tokens = Session.load(state, model).tokens
    assert tokens == vocabulary.encode(long).ids
    assert f"{len(tokens)} tokens and their state: {state}" in result.err
    steps: list[int] = []
    step = CausalLM.step
    monkeypatch.setattr(
        CausalLM, "step", lambda self, ids, *rest: (steps.append(ids.shape[1]), step(self, ids, *rest))[1]
    )
    expected = {
        row["prompt"]: model.generate([tokens + vocabulary.encode(row["prompt"]).ids], max_new_tokens=6)[0]
        for row in ROWS
    }
    steps.clear()
    assert (
        cli(*common, "--load_state", state, "--prompts_file", prompts, "--output", tmp_path / "found.jsonl").code == 0
    )
    assert max(steps) == max(len(vocabulary.encode(row["prompt"]).ids) for row in ROWS)
    for row in read(tmp_path / "found.jsonl"):
        assert row["completion"] == vocabulary.decode(expected[row["prompt"]]).rstrip("\N{REPLACEMENT CHARACTER}")
    # the text itself is gone on with, and its state again
    result = cli(*common, "--load_state", state, "--save_state", tmp_path / "later")
    (answer,) = model.generate([tokens], max_new_tokens=6)
    assert result.out == vocabulary.decode(answer).rstrip("\N{REPLACEMENT CHARACTER}") + "\n"
    assert Session.load(tmp_path / "later", model).tokens == tokens + answer


def test_a_text_beyond_the_training_length_is_a_note(cli: Cli, saved: Path) -> None:
    long = "ä" * 40
    result = cli("generate", "--checkpoint", saved, "--prompt", long, *GREEDY)
    assert (result.code, result.out.startswith(long)) == (0, True)
    assert result.err.startswith("note: a text of 40 tokens is longer than those of training (32)")
    assert len(result.err.splitlines()) == 1
    result = cli("generate", "--checkpoint", saved, "--prompt", json.dumps([long, long, "words"]), *GREEDY)
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts_file", "{bad}"], "bad.jsonl, line 2 is no JSON"),
        (["--prompts_file", "{model}"], "model"),  # a folder
        (["--prompt", '["a", "b"]', "--interactive"], "--interactive is about one text: give one --prompt at most"),
        (
            ["--prompt", "a", "--output", "{new}", "--save_state", "{new}"],
            "--save_state keeps one text: give one --prompt",
        ),
        (["--output", "{new}"], "nothing to continue: give --prompt 'Some text', --prompts_file FILE or --interactive"),
        (["--output", "{new}", "--load_state", "{new}"], "nothing to continue"),
        (["--prompt", "a", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--prompt", "a", "--load_state", "{new}"], "there is no saved state {new}"),
        (["--prompt", "a", "--load_state", "{bad}"], "bad.jsonl is no saved state, or damaged"),
        (["--prompt", "a", "--load_state", "{weights}"], "is no saved state of this version of the code"),
        (["--prompt", "a", "--load_state", "{others}"], "is the state of another model (chunk_size is 8, not 4): read"),
        (["--prompt", "a", "--output", "{new}", "--max_new_tokens", "-1"], "max_new_tokens must be at least 0, got -1"),
        (["--prompt", "a", "--output", "{bad}"], "bad.jsonl exists: choose another --output"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, saved: Path, tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    model = CausalLM.from_pretrained(saved)
    other = Session(CausalLM(type(model.config)(**model.config.to_dict() | {"chunk_size": 8})))
    other.add([1, 2])
    other.save(tmp_path / "others")
    places = {name: str(tmp_path / name) for name in ("new", "model", "others")}
    places |= {"bad": str(tmp_path / "bad.jsonl"), "weights": str(saved / "model.safetensors")}
    given = [option.format(**places) if option.startswith("{") else option for option in options]
    result = cli("generate", "--checkpoint", saved, *given)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1
    assert message.replace("{new}", places["new"]) in result.err
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial").exists()
