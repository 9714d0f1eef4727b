import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datamodules.prepare as module
from datamodules.prepare import prepare
from datamodules.shards import ShardWriter, TokenShards
from datamodules.tokenizer import fingerprint, load_tokenizer, tokenizer_file

ROOT = Path(module.__file__).parents[1]
TEXTS = [f"Document {i} says {'ä' * (i % 5)} and then some more words." for i in range(60)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def run(source: Path, output: Path, **options: Any) -> None:
    prepare(output, str(source), **{"vocab_size": 300, "held_out": 0.2, **options})


def decoded(output: Path, split: str) -> list[str]:
    shards, tokenizer = TokenShards(output / split), load_tokenizer(output)
    tokens = np.empty((1, shards.num_tokens), np.int64)
    shards.read_into(np.array([0]), tokens)
    ends = np.flatnonzero(tokens[0] == shards.index.eos_id)
    assert ends[-1] == shards.num_tokens - 1
    return [tokenizer.decode(part[part != shards.index.eos_id].tolist()) for part in np.split(tokens[0], ends)][:-1]


def test_shards_hold_the_text(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(source, tmp_path / "out")
    train, val = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert 4 <= len(val) <= 25
    shards = TokenShards(tmp_path / "out" / "val")
    assert shards.index.tokenizer_sha256 == fingerprint(tmp_path / "out" / "tokenizer.json")
    assert shards.bytes_per_token == sum(len(text.encode()) for text in val) / shards.num_tokens
    assert sum(file.num_chars or 0 for file in shards.index.files) == sum(map(len, val))
    assert f"{len(val)} documents" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out"}


def test_a_second_call_does_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "out")
    monkeypatch.setattr(module, "train_tokenizer", None)
    run(source, tmp_path / "out", num_workers=1)
    assert "out is up to date" in capsys.readouterr().out


def test_other_arguments_need_overwrite(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"held_out was 0.2, is 0.4.*add --overwrite"):
        run(source, tmp_path / "out", held_out=0.4)
    (source / "b.txt").write_text("one more")
    with pytest.raises(FileExistsError, match="source_version was"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", overwrite=True)
    assert "one more" in decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out"}


def test_damage_needs_overwrite(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    (tmp_path / "out" / "train" / "shard-00000.bin").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"it is damaged \(.*shard-00000.bin has 0 bytes"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", overwrite=True)
    TokenShards(tmp_path / "out" / "train").verify()


def test_a_strangers_folder_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="was not made by prepare"):
        run(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.parametrize("there_before", [False, True])
def test_an_interrupted_call_leaves_things_as_they_were(
    source: Path, tmp_path: Path, there_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there_before:
        run(source, tmp_path / "out", held_out=0.4)
    writes = []

    def write(self: ShardWriter, *args: Any, **options: Any) -> None:
        writes.append(args)
        if len(writes) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(ShardWriter, "write", write)
        run(source, tmp_path / "out", overwrite=True)
    assert len(writes) == 30
    assert {path.name for path in tmp_path.iterdir()} == {"texts"} | ({"out"} if there_before else set())
    run(source, tmp_path / "out", overwrite=True)
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == sorted(TEXTS)


def test_what_a_killed_call_left_is_cleared(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "train").mkdir(parents=True)
    run(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out"}


def test_a_given_tokenizer_is_used(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "first", vocab_size=280)
    given = tmp_path / "compact.json"
    given.write_text(json.dumps(json.loads((tmp_path / "first" / "tokenizer.json").read_text())))
    for output, tokenizer in (("second", given), ("third", tmp_path / "first")):
        run(source, tmp_path / output, tokenizer=tokenizer)
        assert fingerprint(tmp_path / output / "tokenizer.json") == fingerprint(tokenizer_file(tokenizer))
        assert TokenShards(tmp_path / output / "train").index.vocab_size == 280


def test_held_out_text_does_not_shape_the_tokenizer(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    held_out = set(decoded(tmp_path / "out", "val"))
    rows = [text for text in TEXTS if text not in held_out]
    (source / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*rows, *held_out]))
    run(source, tmp_path / "again")
    assert fingerprint(tmp_path / "out/tokenizer.json") == fingerprint(tmp_path / "again/tokenizer.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0}, "held_out=0 must lie between 0 and 1"),
        ({"held_out": 1e-9}, "no document is left for val"),
        ({"num_workers": 0}, "num_workers=0 must be at least 1"),
        ({"vocab_size": 100}, "vocab_size=100 is too small"),
        ({"text_key": "body"}, "no text in 'body'"),
    ],
)
def test_bad_arguments_are_refused(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"texts"}


def test_importing_it_is_light() -> None:
    code = "import sys, datamodules.prepare; print({'torch', 'lightning', 'datasets'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"
