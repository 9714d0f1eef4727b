"""From text to shards: what is written, what is refused, and what several workers make of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import datamodules.pretraining as module
from datamodules.pretraining import merge, prepare_pretrain
from datamodules.shards import TokenShards
from datamodules.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer

ROOT = Path(module.__file__).parents[1]
TEXTS = [f"Document {i} says {'ä' * (i % 5)} and then some more words." for i in range(60)]


def jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    jsonl(folder / "a.jsonl", TEXTS)
    return folder


def run(source: Path, output: Path, **options: Any) -> None:
    prepare_pretrain(output, str(source), **{"vocab_size": 300, "held_out": 0.2, "num_processes": 1, **options})


def documents(output: Path, split: str) -> list[str]:
    shards, tokenizer = TokenShards(output / split), load_tokenizer(output)
    tokens = np.empty((1, shards.num_tokens), np.int64)
    shards.read_into(np.array([0]), tokens)
    ends = np.flatnonzero(tokens[0] == shards.index.eos_id)
    assert ends[-1] == shards.num_tokens - 1
    return [tokenizer.decode(part[part != shards.index.eos_id].tolist()) for part in np.split(tokens[0], ends)][:-1]


def both(output: Path) -> list[str]:
    return documents(output, "train") + documents(output, "val")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_shards_hold_the_text_in_order(
    source: Path, tmp_path: Path, num_processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, tmp_path / "out", num_processes=num_processes)
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert 4 <= len(val) <= 25
    shards = TokenShards(tmp_path / "out" / "val")
    shards.verify()
    assert shards.index.tokenizer_sha256 == fingerprint(tmp_path / "out" / "tokenizer.json")
    assert shards.bytes_per_token == sum(len(text.encode()) for text in val) / shards.num_tokens
    (file,) = shards.index.files
    assert (file.num_chars, file.num_documents) == (sum(map(len, val)), len(val))
    assert f"{len(val)} documents" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "val", "tokenizer.json", "prepare.json"}


def test_a_second_call_does_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "out")
    monkeypatch.setattr(module, "train_tokenizer", None)
    run(source, tmp_path / "out", num_processes=2)
    assert "out is up to date" in capsys.readouterr().out


def test_other_arguments_need_overwrite(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"held_out was 0.2, is 0.4.*add --overwrite"):
        run(source, tmp_path / "out", held_out=0.4)
    with pytest.raises(FileExistsError, match="seed was 0, is 1"):
        run(source, tmp_path / "out", seed=1)
    (source / "b.txt").write_text("one more")
    with pytest.raises(FileExistsError, match="source_version was"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", overwrite=True)
    assert "one more" in both(tmp_path / "out")


def test_damage_needs_overwrite(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    (file,) = TokenShards(tmp_path / "out" / "train").index.files
    (tmp_path / "out" / "train" / file.name).write_bytes(b"")
    with pytest.raises(FileExistsError, match=rf"it is damaged \(.*{file.name} has 0 bytes"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", overwrite=True)
    TokenShards(tmp_path / "out" / "train").verify()


def test_a_strangers_folder_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="was not made by prepare"):
        run(source, tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"thesis.tex"}


def test_parts_end_behind_a_document(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", shard_tokens=100)
    files = TokenShards(tmp_path / "out" / "train").index.files
    assert len(files) > 4
    assert all(100 <= file.num_tokens < 130 for file in files[:-1])
    assert sorted(both(tmp_path / "out")) == sorted(TEXTS)
    run(source, tmp_path / "whole")
    assert documents(tmp_path / "out", "train") == documents(tmp_path / "whole", "train")


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven files, each a unit."""
    monkeypatch.setattr("datamodules.text_sources._UNIT_BYTES", 1)
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(7):
        jsonl(folder / f"{i}.jsonl", TEXTS[8 * i : 8 * i + 8])
    return folder


@pytest.mark.parametrize("num_workers", [2, 3, 9])
def test_any_number_of_workers_makes_the_same_bytes(many: Path, tmp_path: Path, num_workers: int) -> None:
    run(many, tmp_path / "alone", shard_tokens=100)
    given = str(tmp_path / "alone" / "tokenizer.json")
    run(many, tmp_path / "one", shard_tokens=100, tokenizer=given)
    for worker in reversed(range(num_workers)):
        if worker == 0:
            with pytest.raises(ValueError, match=r"of 7 units are not finished \(0[,)].*then merge"):
                merge(tmp_path / "several")
        run(many, tmp_path / "several", shard_tokens=100, tokenizer=given, worker=worker, num_workers=num_workers)
    merge(tmp_path / "several")
    assert files_of(tmp_path / "several") == files_of(tmp_path / "one")
    run(many, tmp_path / "several", shard_tokens=100, tokenizer=given)


def test_the_split_is_stable_under_another_cut_of_the_source(many: Path, source: Path, tmp_path: Path) -> None:
    run(many, tmp_path / "a")
    jsonl(source / "a.jsonl", TEXTS[:56][::-1])
    run(source, tmp_path / "b")
    assert set(documents(tmp_path / "a", "val")) == set(documents(tmp_path / "b", "val"))
    run(source, tmp_path / "c", seed=1)
    assert set(documents(tmp_path / "c", "val")) != set(documents(tmp_path / "b", "val"))


def test_a_given_tokenizer_is_used_byte_by_byte(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "first", vocab_size=280)
    given = tmp_path / "compact.json"
    given.write_text(json.dumps(json.loads((tmp_path / "first" / "tokenizer.json").read_text())))
    for output, tokenizer in (("second", given), ("third", tmp_path / "first")):
        run(source, tmp_path / output, tokenizer=str(tokenizer))
        file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        assert fingerprint(tmp_path / output / "tokenizer.json") == fingerprint(file)
        assert TokenShards(tmp_path / output / "train").index.vocab_size == 280
    given.write_text((tmp_path / "first" / "tokenizer.json").read_text())
    with pytest.raises(FileExistsError, match="tokenizer was"):
        run(source, tmp_path / "second", tokenizer=str(given))


def test_large_vocabularies_take_four_bytes(tmp_path: Path, source: Path) -> None:
    words = [END_OF_TEXT, *sorted({word for text in TEXTS for word in text.split()})]
    vocab = {f"unused{i}": i for i in range(70_000)} | {word: 70_000 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "large.json"))
    run(source, tmp_path / "out", tokenizer=str(tmp_path / "large.json"))
    assert TokenShards(tmp_path / "out" / "train").index.dtype == "uint32"
    assert sorted(both(tmp_path / "out")) == sorted(" ".join(text.split()) for text in TEXTS)


def test_held_out_text_does_not_shape_the_tokenizer(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    held_out = set(documents(tmp_path / "out", "val"))
    jsonl(source / "a.jsonl", [*(text for text in TEXTS if text not in held_out), *held_out])
    run(source, tmp_path / "again")
    assert fingerprint(tmp_path / "out/tokenizer.json") == fingerprint(tmp_path / "again/tokenizer.json")


def test_a_document_larger_than_any_batch(source: Path, tmp_path: Path) -> None:
    large = "A story without an end, told again and again. " * 30_000
    jsonl(source / "b.jsonl", ["before", large, "behind"])
    run(source, tmp_path / "out", num_processes=2)
    assert large in both(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0}, "held_out=0 must lie between 0 and 1"),
        ({"held_out": 1e-9}, "no document is left for val"),
        ({"num_workers": 0}, "num_workers=0 must be at least 1"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be at least 1"),
        ({"worker": 2, "num_workers": 2}, "worker=2 must lie between 0 and num_workers - 1 = 1"),
        ({"num_workers": 2}, "several workers need one tokenizer: give --tokenizer"),
        ({"vocab_size": 100}, "vocab_size=100 is too small"),
        ({"text_key": "body"}, "no text in 'body'"),
    ],
)
def test_bad_arguments_are_refused(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "train").exists()


def test_merging_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere holds no work of prepare pretrain"):
        merge(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_importing_it_is_light() -> None:
    code = "import sys, datamodules.pretraining; print({'torch', 'lightning', 'datasets'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"


def test_a_flipped_byte_is_mended_by_overwriting(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    whole = files_of(tmp_path / "out")
    path = next((tmp_path / "out" / "train").glob("*.bin"))
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    run(source, tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == whole
