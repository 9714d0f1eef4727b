"""generate from every kind of checkpoint, from any prompts, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from datamodules.shards import ShardWriter
from datamodules.tokenizer import load_tokenizer
from lightning_modules import LanguageModel
from rat import CausalLM, ops
from rat_cli.convert import convert
from rat_cli.text_stream import decoded

Cli = Callable[..., Any]
RELEASED = Path(__file__).parents[1] / "golden" / "rat" / "released_layout.pth"
CASE = json.loads(RELEASED.with_name("case.json").read_text())["config"]
TOLD = {"num_heads": CASE["d_model"] // CASE["d_head"], "chunk_size": CASE["chunk_size"]}
TELL = ["--architecture", json.dumps(TOLD)]
GREEDY = ["--temperature", "0", "--max_new_tokens", "8", "--stop_at_end_of_text", "false"]


def expected(folder: Path, *prompts: str, count: int = 8) -> list[str]:
    """Greedy continuations, prompt included, a prompt at a time."""
    vocabulary, model = load_tokenizer(folder), CausalLM.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        (tokens,) = model.generate([vocabulary.encode(prompt).ids], max_new_tokens=count)
        texts.append(prompt + "".join(decoded(vocabulary, iter(tokens))))
    return texts


def test_a_saved_model_continues_a_prompt(cli: Cli, saved: Path) -> None:
    result = cli("generate", "--checkpoint", saved, "--prompt", "some words", *GREEDY)
    assert (result.code, result.err) == (0, "")
    assert result.out == expected(saved, "some words")[0] + "\n"


def test_a_checkpoint_of_training_gives_the_same(cli: Cli, saved: Path, tmp_path: Path) -> None:
    module = LanguageModel(CausalLM.from_pretrained(saved).config, init_from=saved)
    module.configure_model()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    options = ["--tokenizer", saved / "tokenizer.json", "--prompt", "some words", *GREEDY]
    result = cli("generate", "--checkpoint", tmp_path / "last.ckpt", *options)
    assert (result.code, result.out) == (0, expected(saved, "some words")[0] + "\n")


def test_a_model_of_the_hub_brings_its_tokenizer(cli: Cli, saved: Path, hub: Path) -> None:
    shutil.copytree(saved, hub, dirs_exist_ok=True)
    result = cli("generate", "--checkpoint", "some/model", "--prompt", "some words", *GREEDY)
    assert (result.code, result.out) == (0, expected(saved, "some words")[0] + "\n")


@pytest.mark.parametrize("form", ["file", "shards"])
def test_the_tokenizer_is_that_of_the_runs_data(cli: Cli, tiny: Path, tmp_path: Path, form: Any, saved: Path) -> None:
    data = tmp_path / "data"
    vocabulary = Tokenizer(models.BPE({**{chr(97 + i): i for i in range(20)}, "</s>": 20}, []))
    options = ["--data.init_args.path", data, "--data.init_args.seq_len", "8"]
    for split in ("train", "val"):
        with ShardWriter(data / split, vocab_size=64, eos_id=20) as writer:
            writer.write([i % 20 for i in range(100)])
    assert cli("fit", "--config", tiny, *options).code == 0
    checkpoint = tmp_path / "run" / "tiny" / "checkpoints" / "last.ckpt"
    if form == "shards":
        convert(checkpoint, whole := checkpoint.with_name("shards.ckpt"), form)
        checkpoint = whole
    told = ["generate", "--checkpoint", checkpoint, "--prompt", "abc", *GREEDY]
    result = cli(*told)
    assert (result.code, f"no tokenizer.json in {checkpoint.parent}, {data}: give" in result.err) == (1, True)
    vocabulary.save(str(data / "tokenizer.json"))
    assert cli(*told).out == cli(*told, "--tokenizer", data).out != ""


def test_a_released_file_generates(cli: Cli, tmp_path: Path) -> None:
    model = CausalLM.from_pretrained(RELEASED, TOLD)
    # of single letters, no more than the model's vocabulary
    letters = {chr(97 + i): i for i in range(min(20, model.config.vocab_size - 1))}
    vocabulary = Tokenizer(models.BPE({**letters, "</s>": len(letters)}, []))
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    result = cli("generate", "--checkpoint", RELEASED, "--tokenizer", tmp_path, "--prompt", "abc", *TELL, *GREEDY)
    assert result.code == 0, result.err
    (tokens,) = model.generate([[0, 1, 2]], max_new_tokens=8)
    known = load_tokenizer(tmp_path)
    assert result.out == "abc" + "".join(decoded(known, iter(tokens))) + "\n"


def test_several_prompts_and_those_of_a_file_are_answered_in_order(cli: Cli, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("more\nsome text and words\n")
    options = ["--prompt", '["words", "of some words of text"]', "--prompts_file", tmp_path / "prompts.txt", *GREEDY]
    result = cli("generate", "--checkpoint", saved, *options)
    assert result.code == 0, result.err
    prompts = ["words", "of some words of text", "more", "some text and words"]
    assert result.out == "".join(text + "\n\n" for text in expected(saved, *prompts))


def test_a_single_answer_comes_piece_by_piece(cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *text, **options: pieces.append("".join(text)))
    cli("generate", "--checkpoint", saved, "--prompt", "some words", *GREEDY)
    assert pieces[0] == "some words"
    assert len(pieces) > 3
    assert "".join(pieces) == expected(saved, "some words")[0]


def test_the_seed_decides_the_draws(cli: Cli, saved: Path) -> None:
    options = ["--checkpoint", saved, "--prompt", "some words", "--max_new_tokens", "12"]
    first, again, other = (cli("generate", *options, "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == again != other


def test_options_come_from_a_file_too(cli: Cli, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("{temperature: 0, max_new_tokens: 2, stop_at_end_of_text: false}")
    result = cli("generate", "--config", tmp_path / "options.yaml", "--checkpoint", saved, "--prompt", "more")
    assert result.out == expected(saved, "more", count=2)[0] + "\n"
    (tmp_path / "options.yaml").write_text("{temperatur: 0}")
    result = cli("generate", "--config", tmp_path / "options.yaml", "--checkpoint", saved, "--prompt", "more")
    assert (result.code, "unknown key temperatur, did you mean temperature?" in result.err) == (2, True)


def test_the_backend_is_chosen(cli: Cli, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["generate", "--checkpoint", saved, "--prompt", "some words", *GREEDY, "--kernel_backend"]
    with ops.use_backend("auto"):
        result = cli(*asked, "reference")
        assert ops.get_backend() == "reference"
    assert (result.code, result.out) == (0, expected(saved, "some words")[0] + "\n")
    monkeypatch.setattr(ops.backend, "INTERPRETED", False)
    result = cli(*asked, "triton")
    assert (result.code, "kernel backend triton cannot run: its kernels need an NVIDIA" in result.err) == (1, True)
    assert ops.get_backend() == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--checkpoint": "none"}, "there is no checkpoint none"),
        ({"--checkpoint": "none.ckpt", "--tokenizer": "{saved}"}, "none.ckpt"),
        ({"--checkpoint": "{saved}/config.json", "--tokenizer": "{saved}"}, "config.json is damaged"),
        ({"--checkpoint": "{half}", "--tokenizer": "{saved}"}, "half.ckpt is damaged or no checkpoint"),
        ({"--checkpoint": "{foreign}", "--tokenizer": "{saved}"}, "holds no model_config"),
        ({"--checkpoint": "{bare}"}, "no tokenizer.json in {bare}: give --tokenizer FILE"),
        ({"--tokenizer": "none.json"}, "none.json does not exist"),
        ({"--tokenizer": "{saved}/config.json"}, "is not a tokenizer.json"),
        (
            {"--checkpoint": str(RELEASED), "--tokenizer": "{saved}", "--architecture": json.dumps(TOLD)},
            "give the --tokenizer that its data was prepared",
        ),
        ({"--checkpoint": str(RELEASED), "--tokenizer": "{saved}"}, "does not tell its num_heads, chunk_size"),
        ({"--prompt": ""}, "a prompt is empty"),
        ({"--prompt": None}, "nothing to continue: give --prompt 'Some text', --prompts_file FILE or --interactive"),
        ({"--prompts_file": "none.txt"}, "none.txt"),
        ({"--temperature": "-1"}, "temperature must be at least 0"),
        ({"--top_k": "0"}, "top_k must be at least 1"),
        ({"--top_p": "2"}, "top_p must be above 0 and at most 1"),
        ({"--repetition_penalty": "0"}, "repetition_penalty must be above 0"),
        ({"--max_new_tokens": "-1"}, "max_new_tokens"),
        ({"--device": "gpu"}, "there is no device 'gpu' here: give cpu, cuda or cuda:N"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, saved: Path, tmp_path: Path, options: dict[str, str | None], message: str
) -> None:
    places = {name: str(tmp_path / name) for name in ("bare", "half.ckpt", "foreign.ckpt")}
    places = {name.removesuffix(".ckpt"): place for name, place in places.items()} | {"saved": str(saved)}
    shutil.copytree(saved, places["bare"])
    Path(places["bare"], "tokenizer.json").unlink()
    Path(places["half"]).write_bytes(b"PK half")
    torch.save({"state_dict": {}}, places["foreign"])

    def fill(value: str) -> str:
        return value.format(**places) if re.search(r"\{[a-z]+\}", value) else value

    given = {"--checkpoint": "{saved}", "--prompt": "words", **options}
    arguments = [text for name, value in given.items() if value is not None for text in (name, fill(value))]
    result = cli("generate", *arguments)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1
    assert fill(message) in result.err
