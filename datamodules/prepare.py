"""From text to shards: what `python cli.py prepare` does."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from datamodules.corpus import docstring_documents, find_modules, package_versions
from datamodules.shards import ShardWriter, TokenShards
from datamodules.text_sources import Document, folder_documents, list_files
from datamodules.tokenizer import end_of_text_id, fingerprint, load_tokenizer, tokenizer_file, train_tokenizer

DOCSTRINGS = "docstrings"
_RECORD = "prepare.json"
_BATCH_CHARS = 2_000_000
_TOKENIZER_CHARS = 200_000_000


def prepare(
    output: Path,
    source: str = DOCSTRINGS,
    vocab_size: int = 4096,
    tokenizer: Path | None = None,
    held_out: float = 0.02,
    text_key: str = "text",
    num_workers: int = 2,
    overwrite: bool = False,
) -> None:
    """Turn text into shards for training: output/{tokenizer.json, train/, val/}.

    Every document ends with the end-of-text token; nothing is put before it. A second call with the same
    arguments and the same source returns at once. An interrupted one leaves nothing behind that looks
    finished.

    Args:
        output: folder to make.
        source: 'docstrings', the docstrings of the Python packages installed here, which needs no network; or
            a folder of .txt files (a document each), .jsonl and .parquet files (a document per row).
        vocab_size: tokens of the byte-level BPE that is trained on the text.
        tokenizer: a tokenizer.json to use instead of training one.
        held_out: share of the documents kept for validation, chosen by a hash of each.
        text_key: column of the .jsonl and .parquet files that holds the text.
        num_workers: processes and threads that read and encode.
        overwrite: replace what a call with other arguments made.

    Raises:
        FileExistsError: output holds something else, and overwrite is not set.
        ValueError: arguments or files that cannot be used; the message names them.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1: it is a share of the documents")
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} must be at least 1")
    os.environ.setdefault("RAYON_NUM_THREADS", str(num_workers))
    started, output = time.monotonic(), Path(output)
    if tokenizer is not None:
        tokenizer = tokenizer_file(tokenizer)
        load_tokenizer(tokenizer)
    documents, version = _open_source(source, text_key, held_out, num_workers)
    made_with = {
        "source": source if source == DOCSTRINGS else str(Path(source)),
        "source_version": version,
        "tokenizer": vocab_size if tokenizer is None else fingerprint(tokenizer),
        "held_out": held_out,
        "text_key": text_key,
    }
    if _is_done(output, made_with, overwrite):
        print(f"{output} is up to date")
        return
    counts = _make(output, documents, tokenizer or vocab_size, made_with)
    _report(output, counts, time.monotonic() - started)


def _make(
    output: Path,
    documents: Callable[[], Iterable[Document]],
    tokenizer: Path | int,
    made_with: dict[str, Any],
) -> dict[str, dict[str, int]]:
    """Make all of `output` beside it, and move it there when it is whole; what is in each split.

    `tokenizer` is the file of one, or the size of the vocabulary to train one for.
    """
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        saved = partial / "tokenizer.json"
        if isinstance(tokenizer, Path):
            # a copy, since saving it anew could change its bytes and with them its fingerprint
            shutil.copyfile(tokenizer, saved)
        else:
            train_tokenizer(_training_texts(documents()), tokenizer).save(str(saved))
        counts = _write_splits(documents(), load_tokenizer(saved), partial)
        for split in counts:
            TokenShards(partial / split).verify()
        (partial / _RECORD).write_text(json.dumps({"made_with": made_with, "counts": counts}, indent=1) + "\n")
        _replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return counts


def _open_source(
    source: str, text_key: str, held_out: float, num_workers: int
) -> tuple[Callable[[], Iterable[Document]], Any]:
    """A function that gives the documents of `source`, any number of times, and what their content depends on."""
    if source == DOCSTRINGS:
        read: list[Document] = []

        def documents() -> list[Document]:
            read[:] = read or docstring_documents(find_modules(), held_out, num_workers)
            return read

        return documents, package_versions()
    files = list_files(Path(source))
    stats = [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    version = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    return lambda: folder_documents(files, text_key, held_out), version


def _is_done(output: Path, made_with: dict[str, Any], overwrite: bool) -> bool:
    """Whether `output` already is what would be made. Raises FileExistsError if it is anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / _RECORD).is_file():
        # never to be replaced: it could be anybody's
        raise FileExistsError(f"{output} exists and was not made by prepare: choose another --output")
    try:
        before = json.loads((output / _RECORD).read_text())["made_with"]
        changed = [f"{key} was {before[key]}, is {now}" for key, now in made_with.items() if before[key] != now]
        for split in ("train", "val"):
            TokenShards(output / split, tokenizer_sha256=fingerprint(output / "tokenizer.json"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        changed = [f"it is damaged ({error})"]
    if changed and not overwrite:
        raise FileExistsError(f"{output} exists, but {'; '.join(changed)}: choose another --output, or add --overwrite")
    return not changed


def _training_texts(documents: Iterable[Document]) -> Iterator[str]:
    """The text a tokenizer is trained on: none that is held out, and not more than its merges can profit from."""
    chars = 0
    for document in documents:
        if not document.held_out:
            yield document.text
            chars += len(document.text)
        if chars > _TOKENIZER_CHARS:
            return


def _write_splits(documents: Iterable[Document], tokenizer: Tokenizer, folder: Path) -> dict[str, dict[str, int]]:
    """Encode `documents` into folder/train and folder/val; what is in each."""
    eos_id = end_of_text_id(tokenizer)
    counts = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in ("train", "val")}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    folder / split,
                    vocab_size=tokenizer.get_vocab_size(),
                    eos_id=eos_id,
                    tokenizer_sha256=fingerprint(folder / "tokenizer.json"),
                )
            )
            for split in counts
        }
        for batch in _batches(tqdm(documents, desc="encoding", unit="document")):
            encoded = tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
            for document, encoding in zip(batch, encoded, strict=True):
                split = "val" if document.held_out else "train"
                tokens, num_bytes = [*encoding.ids, eos_id], len(document.text.encode())
                writers[split].write(tokens, num_bytes=num_bytes, num_chars=len(document.text))
                for name, count in (("documents", 1), ("bytes", num_bytes), ("tokens", len(tokens))):
                    counts[split][name] += count
        for split, counted in counts.items():
            if not counted["documents"]:
                raise ValueError(f"no document is left for {split}: give more text, or another --held_out")
    return counts


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents of about _BATCH_CHARS together, enough to keep all cores at work."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars > _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def _replace(partial: Path, output: Path) -> None:
    """Put `partial` in the place of `output`, which is missing for no longer than a rename takes."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _report(output: Path, counts: dict[str, dict[str, int]], seconds: float) -> None:
    for split, count in counts.items():
        print(
            f"{output / split}: {count['documents']:,} documents, {count['bytes']:,} bytes,"
            f" {count['tokens']:,} tokens ({count['bytes'] / count['tokens']:.2f} bytes per token)"
        )
    print(f"prepared in {seconds:.0f} s")
