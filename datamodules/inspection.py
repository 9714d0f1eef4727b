"""A look into shards: their documents, statistics, a picture of the lengths; and whether they are whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from datamodules.shards import INDEX, ShardError, TokenShards
from datamodules.tokenizer import describe_tokenizer, end_of_text_id, load_tokenizer

_CHUNK = 1 << 24


def inspect(
    path: Path,
    document: int = 0,
    num_documents: int = 3,
    max_chars: int = 600,
    tokenizer: Path | None = None,
    plot: Path = Path("document-lengths.png"),
) -> None:
    """Print some documents of shards as text, and statistics of all; draw a histogram of their lengths.

    Args:
        path: a folder of shards, one of its files, a raw uint16 file, or a prepared folder, of which train/ is shown.
        document: the first one to print, from 0.
        num_documents: how many to print.
        max_chars: of each at most so many characters.
        tokenizer: a tokenizer.json, or a folder that holds one. Default: the one beside the shards.
        plot: the picture, in any format that matplotlib knows by its ending.

    Raises:
        ShardError: no shards there, damaged ones, or of another tokenizer.
        FileNotFoundError: no tokenizer.
        ValueError: a document or number of documents that there cannot be.
    """
    if document < 0 or num_documents < 0 or max_chars < 1:
        raise ValueError(f"impossible: {document=}, {num_documents=}, {max_chars=}")
    shards = TokenShards(path / "train" if (path / "train").is_dir() else path)
    beside = _tokenizer_beside(shards.folder) if tokenizer is None else tokenizer
    vocabulary = load_tokenizer(beside)
    if shards.index.tokenizer_sha256 not in (None, describe_tokenizer(beside)):
        raise ShardError(f"{shards.path} was made with another tokenizer than {beside}: give that one as --tokenizer")
    eos_id = end_of_text_id(vocabulary) if shards.index.eos_id is None else shards.index.eos_id
    ends = _ends(shards, eos_id)
    if num_documents and document >= len(ends):
        raise ValueError(f"{shards.path} has {len(ends):,} documents, there is none with number {document}")
    starts = np.concatenate([[0], ends[:-1] + 1])
    for number in range(document, min(document + num_documents, len(ends))):
        print(f"--- document {number:,}: {ends[number] + 1 - starts[number]:,} tokens")
        print(_text(shards, vocabulary, int(starts[number]), int(ends[number]), max_chars))
    lengths = ends + 1 - starts
    print(f"--- {shards.path}")
    print("\n".join(f"{name:<26}{value:>16}" for name, value in _statistics(shards, lengths)))
    _draw(lengths, str(shards.path), plot)
    print(f"{'lengths drawn in':<26}{plot}")


def verify(path: Path) -> None:
    """Read shards whole and compare every file with the checksum that its index holds.

    Args:
        path: a prepared folder, or one folder of shards.

    Raises:
        ShardError: no shards with an index there, or a file that is not as it was written; the message names it.
    """
    folders = [path] if (path / INDEX).is_file() else sorted(index.parent for index in path.glob(f"*/{INDEX}"))
    if not folders:
        raise ShardError(f"{path} holds no shards with an {INDEX}: give a folder made by cli.py prepare")
    for folder in folders:
        shards = TokenShards(folder)
        shards.verify()
        print(f"{folder}: {len(shards.index.files)} files, {shards.num_tokens:,} tokens, as they were written")


def _tokenizer_beside(folder: Path) -> Path:
    for place in (folder, folder.parent):
        if (place / "tokenizer.json").is_file():
            return place
    raise FileNotFoundError(f"there is no tokenizer.json beside {folder}: give --tokenizer FILE")


def _chunks(shards: TokenShards) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """All tokens in pieces, each with the position of its first."""
    with tqdm(total=shards.num_tokens, desc="reading", unit="token", unit_scale=True) as bar:
        for start in range(0, shards.num_tokens, _CHUNK):
            piece = shards.tokens(start, min(shards.num_tokens, start + _CHUNK))
            yield start, piece
            bar.update(len(piece))


def _ends(shards: TokenShards, eos_id: int) -> NDArray[np.int64]:
    """The position of the last token of each document; text behind the last end counts as one more."""
    found = [start + np.flatnonzero(piece == eos_id) for start, piece in _chunks(shards)]
    ends = np.concatenate(found)
    last = shards.num_tokens - 1
    return ends if len(ends) and ends[-1] == last else np.append(ends, last)


def _text(shards: TokenShards, vocabulary: Tokenizer, start: int, end: int, max_chars: int) -> str:
    # no token is shorter than a byte, and no character longer than four of them
    tokens = shards.tokens(start, min(end + 1, start + 4 * max_chars))
    text = vocabulary.decode(tokens.tolist(), skip_special_tokens=True)
    rest = " ..." if len(text) > max_chars or start + len(tokens) <= end else ""
    return text[:max_chars] + rest


def _statistics(shards: TokenShards, lengths: NDArray[np.int64]) -> Iterator[tuple[str, str]]:
    index = shards.index
    yield "tokens", f"{shards.num_tokens:,}"
    yield "documents", f"{len(lengths):,}"
    yield "files", f"{len(index.files):,}"
    yield "type of the tokens", index.dtype
    yield "vocabulary", "unknown" if index.vocab_size is None else f"{index.vocab_size:,}"
    if shards.bytes_per_token is not None:
        yield "bytes of text per token", f"{shards.bytes_per_token:.3f}"
    yield "tokens of a document, mean", f"{lengths.mean():,.1f}"
    for share in (0.05, 0.5, 0.95):
        yield f"  {share:.0%} have at most", f"{int(np.quantile(lengths, share)):,}"
    yield "  shortest, longest", f"{lengths.min():,}, {lengths.max():,}"


def _draw(lengths: NDArray[np.int64], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    edges: Any = np.unique(np.round(np.geomspace(1, max(2, lengths.max() + 1), 60)))
    ax.hist(lengths, bins=edges, color="#2a7f9e")
    ax.axvline(float(np.median(lengths)), color="#d9722e", label=f"median {int(np.median(lengths)):,}")
    ax.set(xscale="log", xlabel="tokens of a document, its end of text included", ylabel="documents", title=title)
    ax.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)
