import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datamodules.shards import ShardError, ShardIndex, ShardWriter, TokenShards


def read(shards: TokenShards, starts: list[int], length: int) -> list[list[int]]:
    out = np.full((len(starts), length), -1)
    shards.read_into(np.array(starts), out)
    return out.tolist()


def write(folder: Path, tokens: list[int], **options: int) -> TokenShards:
    with ShardWriter(folder, **{"vocab_size": 100, "eos_id": 0, "shard_tokens": 4, **options}) as writer:
        writer.write(tokens[:5], num_bytes=7, num_chars=6)
        writer.write(tokens[5:], num_bytes=13, num_chars=9)
    return TokenShards(folder)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokens = [*range(10), vocab_size - 1]
    shards = write(tmp_path / "a", tokens, vocab_size=vocab_size)
    assert [file.num_tokens for file in shards.index.files] == [4, 4, 3]
    assert (shards.index.dtype, shards.num_tokens, shards.index.eos_id) == (dtype, 11, 0)
    assert shards.bytes_per_token == 20 / 11
    # within a file, over one border, over two, and to the end
    assert read(shards, [1, 2, 3, 0], 3) == [[1, 2, 3], [2, 3, 4], [3, 4, 5], [0, 1, 2]]
    assert read(shards, [0, 1], 10) == [tokens[:10], tokens[1:]]
    shards.verify()
    assert read(pickle.loads(pickle.dumps(shards)), [5], 6) == [tokens[5:]]
    assert read(TokenShards(tmp_path / "a" / "shard-00001.bin"), [0], 4) == [[4, 5, 6, 7]]


def test_a_checksum_tells_contents_apart(tmp_path: Path) -> None:
    one, same = (write(tmp_path / name, [*range(10)]).checksum for name in "ab")
    assert one is not None
    assert one == same != write(tmp_path / "c", [*range(9), 0]).checksum
    (tmp_path / "a" / "index.json").unlink()
    assert TokenShards(tmp_path / "a").checksum is None


def test_a_pickle_does_not_carry_the_tokens(tmp_path: Path) -> None:
    shards = write(tmp_path / "a", [1] * 50_000, shard_tokens=50_000)
    read(shards, [0], 2)
    assert len(pickle.dumps(shards)) < 5000


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.raw"])
def test_raw_files_open_without_an_index(tmp_path: Path, name: str) -> None:
    np.arange(6, dtype="<u2").tofile(tmp_path / name)
    shards = TokenShards(tmp_path / name)
    assert read(shards, [2], 4) == [[2, 3, 4, 5]]
    assert shards.index.vocab_size is shards.index.eos_id is shards.bytes_per_token is None


def test_a_folder_of_raw_files_reads_in_the_order_of_names(tmp_path: Path) -> None:
    np.array([3, 4], dtype="<u2").tofile(tmp_path / "b.bin")
    np.array([1, 2], dtype="<u2").tofile(tmp_path / "a.bin")
    assert read(TokenShards(tmp_path), [0], 4) == [[1, 2, 3, 4]]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        ShardWriter(tmp_path / "a", vocab_size=9, eos_id=0) as writer,
    ):
        writer.write([1, 2])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a", [1, 2, 3])
    with pytest.raises(FileExistsError, match="choose another folder"):
        ShardWriter(tmp_path / "a", vocab_size=9, eos_id=0)


@pytest.mark.parametrize("tokens", [[100], [-1], [5, 70_000]])
def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path, tokens: list[int]) -> None:
    with (
        pytest.raises(ValueError, match=r"must lie in \[0, 100\)"),
        ShardWriter(tmp_path / "a", vocab_size=100, eos_id=0) as writer,
    ):
        writer.write(tokens)


def _truncate(folder: Path) -> None:
    with (folder / "shard-00001.bin").open("r+b") as stream:
        stream.truncate(5)


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**content, **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"shard-00001.bin has 5 bytes, not the 8 of 4 uint16 tokens.*--overwrite"),
        (lambda folder: (folder / "shard-00002.bin").unlink(), "shard-00002.bin is named in index.json but"),
        (lambda folder: (folder / "index.json").write_text("[1]"), "not an index of this project's shards"),
        (lambda folder: (folder / "index.json").write_text("{"), "not an index of this project's shards"),
        (_edit(format="mds"), "not an index of this project's shards"),
        (_edit(version=2), "format version 2, this code reads 1"),
        (_edit(dtype="float16"), "dtype 'float16'"),
        (_edit(dtype="uint32"), "not the 16 of 4 uint32 tokens"),
        (_edit(surprise=1), r"is damaged .*surprise"),
        (_edit(files=[]), "holds no tokens"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "a", list(range(11)))
    damage(tmp_path / "a")
    with pytest.raises(ShardError, match=message):
        TokenShards(tmp_path / "a")


def test_a_changed_byte_is_found_on_request(tmp_path: Path) -> None:
    write(tmp_path / "a", list(range(11)))
    with (tmp_path / "a" / "shard-00002.bin").open("r+b") as stream:
        stream.write(b"\x07")
    shards = TokenShards(tmp_path / "a")
    with pytest.raises(ShardError, match=r"shard-00002.bin does not match its checksum"):
        shards.verify()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", vocab_size=9, eos_id=0, tokenizer_sha256="0" * 64) as writer:
        writer.write([1])
    TokenShards(tmp_path / "a", tokenizer_sha256="0" * 64)
    with pytest.raises(ShardError, match=r"another tokenizer \(000000000000, not 111111111111\)"):
        TokenShards(tmp_path / "a", tokenizer_sha256="1" * 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; make it with: python cli.py prepare pretrain"),
        (lambda path: path.mkdir(), "neither index.json nor .*it holds nothing"),
        (lambda path: path.write_bytes(b"123"), "has 3 bytes, no positive whole number"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, no positive whole number"),
    ],
)
def test_what_is_no_shard_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(ShardError, match=message):
        TokenShards(tmp_path / "x")


def test_the_index_is_what_was_saved(tmp_path: Path) -> None:
    index = write(tmp_path / "a", list(range(6))).index
    assert ShardIndex.load(tmp_path / "a" / "index.json") == index
    assert sum(file.num_chars or 0 for file in index.files) == 15
