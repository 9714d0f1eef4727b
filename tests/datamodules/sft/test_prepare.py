import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

import datamodules.sft.prepare as module
from datamodules.sft.examples import Examples
from datamodules.sft.prepare import ExampleEncoder, cut_middle, draw, prepare_sft
from datamodules.sft.tasks import Example, find_task
from datamodules.shards import ShardWriter
from datamodules.tokenizer import fingerprint, load_tokenizer

ROOT = Path(module.__file__).parents[2]
Write = Callable[..., Path]
Rows = Callable[..., Any]


def decoded(output: Path, split: str) -> list[tuple[str, str]]:
    examples, tokenizer = Examples(output / split), load_tokenizer(output)
    texts = []
    for prompt, answer in examples:
        assert answer[-1] == examples.eos_id
        texts.append((tokenizer.decode(prompt.tolist()), tokenizer.decode(answer[:-1].tolist())))
    return texts


def references(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "test" / "references.jsonl").read_text().splitlines()]


def run(output: Path, tokenizer: Path, source: Path, **options: Any) -> None:
    prepare_sft(output, "jsonl", str(tokenizer), source, **{"seq_len": 96, "max_new_tokens": 16, **options})


@pytest.mark.parametrize(
    ("n", "kept"),
    [(10, "abcdefghij"), (11, "abcdefghij"), (9, "abcdghij"), (8, "abcghij"), (4, "aij"), (3, "aj")]
)  # fmt: skip
def test_the_middle_is_cut_by_hand(n: int, kept: str) -> None:
    # n = 9: the first (9 - 1) // 2 = 4 of 8; n = 8: the first (8 - 1) // 2 = 3 of 7
    assert "".join(map(chr, cut_middle([ord(letter) for letter in "abcdefghij"], n))) == kept


def test_prompts_and_answers_by_hand(
    tokenizer: Path, write_rows: Write, hub_rows: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows({split: [hub_rows["narrativeqa"]] for split in ("train", "validation", "test")}, ".parquet")
    prepare_sft(tmp_path / "out", "narrativeqa", str(tokenizer), source, seq_len=192)
    text = "Story: A short story.\n\nQuestion: Who?\n\nAnswer:"
    assert decoded(tmp_path / "out", "train") == decoded(tmp_path / "out", "val") == [(text, " Ann")]
    assert references(tmp_path / "out") == [{"index": 0, "input": "Who?", "answers": ["Ann", "Ann B."]}]
    lengths = np.load(tmp_path / "out" / "train" / "examples.npy")
    assert (lengths.tolist(), lengths.dtype) == ([[len(text), len(" Ann") + 1]], np.uint32)
    assert fingerprint(tmp_path / "out" / "tokenizer.json") == fingerprint(tokenizer)
    assert "train: 1 examples, 51 tokens, 0 prompts cut\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "bytes.json"}


def test_generated_answers_fit_behind_test_prompts(
    tokenizer: Path, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"context": "x" * 100, "input": "y", "answer": "z" * 19}
    rows = {"train": [row], "validation": [row], "test": [row, {**row, "answer": "z" * 9}]}
    run(tmp_path / "out", tokenizer, write_rows(rows), max_new_tokens=16)
    text = f"Context: {row['context']}\n\nQuestion: y\n\nAnswer:"
    # 96 - 21 = 75 tokens of room, for " ", 19 letters and the end: 74 are kept, 37 of them from the beginning
    assert decoded(tmp_path / "out", "train") == [(text[:37] + text[-37:], " " + "z" * 19)]
    assert Examples(tmp_path / "out" / "train").lengths.sum() == 95
    # the second answer has fewer than the 16 tokens that may be generated: 80 of room, 79 kept, 39 from the beginning
    assert decoded(tmp_path / "out", "test")[1] == (text[:39] + text[-40:], " " + "z" * 9)
    assert decoded(tmp_path / "out", "test")[0] == decoded(tmp_path / "out", "train")[0]
    assert "test: 2 examples, 185 tokens, 2 prompts cut" in capsys.readouterr().out


@pytest.mark.parametrize("prepend", [False, True])
def test_the_space_before_an_answer_is_there_once(prepend: bool) -> None:
    """Tokenizers such as LLaMA's put a space before every text of its own, others do not."""
    steps = [normalizers.Replace(" ", "▁")]
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate("▁:no?\nCxteQusiAwr</s>")} | {"</s>": 99}, []))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prepend else steps)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    (found,) = ExampleEncoder(find_task("jsonl"), bpe, 200).encode([Example("xx", "n?", ["no"])], 0, Counter())
    assert bpe.decode(found.prompt + found.answer[:-1]).strip() == "Context: xx\n\nQuestion: n?\n\nAnswer: no"
    assert bpe.decode(found.answer[:-1]) == " no"
    assert found.answer[-1] == 99


def test_a_tokenizer_that_joins_colon_and_space_is_refused() -> None:
    bpe = Tokenizer(models.BPE({":": 0, " ": 1, ": ": 2, "a": 3, "</s>": 4}, [(":", " ")]))
    with pytest.raises(ValueError, match="joins ':' and the space"):
        ExampleEncoder(find_task("jsonl"), bpe, 200)


def test_examples_that_lack_something_are_counted(
    tokenizer: Path, write_rows: Write, plain_rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"context": "c", "input": "i", "answer": "a"}
    bad = [{**row, "context": " "}, {**row, "input": None}, {**row, "answer": ""}, {**row, "answer": None}]
    rows = {"train": [row, *bad, {**row, "answer": "z" * 92}], "validation": [row], "test": [*bad, row]}
    run(tmp_path / "out", tokenizer, write_rows(rows))
    train = next(line for line in capsys.readouterr().out.splitlines() if "train:" in line)
    assert "1 examples" in train
    for part in ("1 left out for want of context", "1 left out for want of input", "2 left out for want of answer"):
        assert part in train
    assert "1 left out for want of room" in train
    assert [example["index"] for example in references(tmp_path / "out")] == [0]


def test_a_split_without_examples_is_named(tokenizer: Path, write_rows: Write, tmp_path: Path) -> None:
    row = {"context": "c", "input": "i", "answer": "a"}
    source = write_rows({"train": [row], "validation": [row], "test": [{**row, "answer": None}] * 3}, ".parquet")
    with pytest.raises(ValueError, match=r"no example is left for test \(3 have no answer\): see --held_out, --test"):
        run(tmp_path / "out", tokenizer, source)
    assert not (tmp_path / "out").exists()


def test_the_draw_can_be_repeated(tokenizer: Path, write_rows: Write, plain_rows: Rows, tmp_path: Path) -> None:
    source = write_rows({"train": plain_rows(5), "validation": plain_rows(5), "test": plain_rows(60)})
    drawn = []
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"test_items": 0}, "e": {"test_items": 99}}.items():
        run(tmp_path / name, tokenizer, source, **{"test_items": 20, **options})
        drawn.append([example["input"] for example in references(tmp_path / name)])
        prompts = [prompt.split("Question: ")[1].split("\n")[0] for prompt, _ in decoded(tmp_path / name, "test")]
        assert prompts == drawn[-1] == sorted(drawn[-1], key=lambda text: int(text[1:-1]))
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(set(part)) for part in drawn] == [20, 20, 20, 60, 60]


def test_the_draw_is_fair() -> None:
    examples = [Example("", str(i), []) for i in range(10)]
    counts = Counter(example.input for seed in range(2000) for example in draw(examples, 3, seed))
    assert min(counts.values()) > 500
    assert max(counts.values()) < 700


def test_padding_is_reported(
    tokenizer: Path, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 31 tokens of prompt without the context, and an answer of 4: documents of 40, 48, 80 and 40 tokens
    rows = [{"context": "x" * n, "input": "y", "answer": "zz"} for n in (5, 13, 45, 5)]
    run(tmp_path / "out", tokenizer, write_rows({"train": rows, "validation": rows, "test": rows}), chunk_size=16)
    assert np.load(tmp_path / "out" / "train" / "examples.npy").sum(axis=1).tolist() == [40, 48, 80, 40]
    # 208 tokens in 4 rows of 96, or padded to 48 (three of them) and 80 in 3
    expected = f"{1 - 208 / 384:.1%} padding in padded rows, {1 - 208 / 288:.1%} in packed ones"
    assert f"  {expected}: packing saves {96 / 176:.1%} of it" in capsys.readouterr().out


def test_a_second_call_does_nothing(
    prepared: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "whole_folder", None)
    run(prepared, tokenizer, prepared.parent / "source", chunk_size=8)
    assert "prepared is up to date" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"seed was 1234, is 1; held_out was 0.05, is 0.1: choose another"):
        run(prepared, tokenizer, prepared.parent / "source", seed=1, held_out=0.1)


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("val/examples.npy", 8, "examples.npy"),
        ("test/references.jsonl", 8, "line 1"),
        ("test/references.jsonl", 10_000, "references.jsonl is of 0 examples, not of 5"),
        ("train/index.json", 9, "index.json"),
    ],
)
def test_damage_needs_overwrite(prepared: Path, tokenizer: Path, name: str, cut: int, message: str) -> None:
    (prepared / name).write_bytes((prepared / name).read_bytes()[:-cut])
    with pytest.raises(FileExistsError, match=rf"it is damaged \(.*{message}"):
        run(prepared, tokenizer, prepared.parent / "source")
    run(prepared, tokenizer, prepared.parent / "source", overwrite=True)
    assert len(Examples(prepared / "val")) == 9


def test_a_strangers_folder_is_never_replaced(prepared: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="was not made by prepare"):
        run(tmp_path / "thesis", tokenizer, prepared.parent / "source", overwrite=True)


@pytest.mark.parametrize("there_before", [False, True])
def test_an_interrupted_call_leaves_things_as_they_were(
    tokenizer: Path, write_rows: Write, plain_rows: Rows, tmp_path: Path, there_before: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = write_rows({"train": plain_rows(5), "validation": plain_rows(5), "test": plain_rows(60)})
    if there_before:
        run(tmp_path / "out", tokenizer, source, seed=1)
    writes = []

    def write(self: ShardWriter, *args: Any, **options: Any) -> None:
        writes.append(args)
        if len(writes) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(ShardWriter, "write", write)
        run(tmp_path / "out", tokenizer, source, overwrite=True)
    assert len(writes) == 8
    left = {path.name for path in tmp_path.iterdir()} - {"source", "bytes.json"}
    assert left == ({"out"} if there_before else set())
    (tmp_path / ".out.partial" / "train").mkdir(parents=True)
    run(tmp_path / "out", tokenizer, source, overwrite=True)
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0.5}, "held_out=0.5 must lie between 0 and 0.5"),
        ({"test_items": -1}, "test_items=-1 must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 at least 1"),
        ({"max_new_tokens": 94}, "seq_len=96 leaves no room for a prompt before max_new_tokens=94"),
        ({"chunk_size": 36}, "chunk_size=36 must divide seq_len=96"),
        ({"setting": "text"}, "setting=text is one of narrativeqa"),
        ({"tokenizer": __file__}, "is not a tokenizer.json"),
    ],
)
def test_bad_arguments_are_refused(
    tokenizer: Path, write_rows: Write, plain_rows: Rows, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    source = write_rows({"train": plain_rows(30)})
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **{"tokenizer": tokenizer, "source": source, **options})
    assert not (tmp_path / "out").exists()


def test_importing_it_is_light() -> None:
    code = "import sys, datamodules.sft.prepare; print({'torch', 'lightning', 'datasets'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"
