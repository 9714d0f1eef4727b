"""From text to shards for pre-training: what `python cli.py prepare pretrain` and `prepare merge` do.

The work is cut into units of the source, in an order that depends on nothing but the source. A unit becomes parts,
each a file of training tokens and one of validation tokens; they and the record of the unit appear one after another,
each at once. So a call that was killed goes on behind its last part, any number of machines can share the units, and
the parts have the same bytes however they were made. Merging gives them an index and moves them to their place.
"""

import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Self

from tqdm import tqdm

from datamodules.encoding import Encoded, Encoder
from datamodules.parts import Plan, WorkFolder
from datamodules.shards import ShardError
from datamodules.text_sources import Split, TextSource, open_source
from datamodules.tokenizer import describe_tokenizer, save_tokenizer, train_tokenizer

DOCSTRINGS = "docstrings"
# Training a tokenizer takes no longer.
_BEGINNING_SECONDS = 600
# More text changes the merges of a BPE no more.
_TOKENIZER_CHARS = 200_000_000


def prepare_pretrain(
    output: Path,
    source: str = DOCSTRINGS,
    name: str | None = None,
    subset: str = "train",
    text_key: str = "text",
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    held_out: float = 0.005,
    seed: int = 0,
    shard_tokens: int = 1 << 26,
    worker: int = 0,
    num_workers: int = 1,
    num_processes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn text into shards for pre-training: output/{tokenizer.json, train/, val/}.

    Every document ends with the end-of-text token; nothing is put before it. Killed at any moment and called again, it
    goes on where it stood. A call after the end returns at once.

    Args:
        output: folder to make.
        source: 'docstrings', those of the Python packages installed here, which needs no network; a folder of .txt
            files (a document each), .jsonl, .json.gz, .jsonl.zst, .parquet or .arrow files (a document per row); or a
            dataset of the Hugging Face hub, such as HuggingFaceFW/fineweb-edu, or a folder with a copy of one.
        name: config of that dataset, such as sample-10BT.
        subset: split of that dataset.
        text_key: column that holds the text.
        tokenizer: a tokenizer.json, a SentencePiece .model of the LLaMA kind, a folder that holds one of them, or a
            name on the hub. Default: a byte-level BPE is trained on the text.
        vocab_size: tokens of the BPE that is trained.
        held_out: share of the documents kept for validation, chosen by a hash of seed and text (of docstrings: by
            module). The paper keeps 0.005.
        seed: of that choice.
        shard_tokens: a file of training tokens is closed behind the document in which it reaches so many.
        worker: which of the num_workers machines this is, from 0.
        num_workers: machines that share the work, each called with another worker; then call prepare merge.
        num_processes: processes that encode. Default: one for each core.
        overwrite: replace what a call with other arguments made.

    Raises:
        FileExistsError: output holds something else, and overwrite is not set.
        ValueError: arguments or files that cannot be used, a full disk, another call at work; the message names it.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1: it is a share of the documents")
    num_processes = num_processes or os.cpu_count() or 1
    least = {"num_processes": num_processes, "num_workers": num_workers, "shard_tokens": shard_tokens}
    for argument, value in least.items():
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1")
    if not 0 <= worker < num_workers:
        raise ValueError(f"worker={worker} must lie between 0 and num_workers - 1 = {num_workers - 1}")
    if tokenizer is None and num_workers > 1:
        raise ValueError("several workers need one tokenizer: give --tokenizer")
    # `datasets` would import torch to stream files, which takes a second and is of no use here
    os.environ.setdefault("USE_TORCH", "0")
    texts = _open(source, name, subset, text_key, Split(held_out, seed), num_processes)
    plan = Plan(
        made_with={
            "source": source,
            "name": name,
            "source_version": texts.version,
            "tokenizer": vocab_size if tokenizer is None else describe_tokenizer(tokenizer),
            "held_out": held_out,
            "seed": seed,
            "text_key": text_key,
            "shard_tokens": shard_tokens,
        },
        num_units=len(texts.sizes),
    )
    work = WorkFolder(output)
    if work.is_done(plan, overwrite):
        print(f"{output} is up to date")
        return
    _begin(
        work, plan, overwrite, wait=num_workers > 1, make=lambda: _make_tokenizer(work, tokenizer, texts, vocab_size)
    )
    units = range(worker, plan.num_units, num_workers)
    with work.lock("plan", shared=True):
        if not work.is_begun(plan, overwrite=False):
            raise ShardError(f"{output} was begun anew by another prepare: stop one of them")
        _write(work, texts, units, shard_tokens, num_processes)
    if num_workers == 1:
        merge(output)
    else:
        print(f"worker {worker}: its {len(units)} of {plan.num_units} units are finished; prepare merge when all are")


def merge(output: Path) -> None:
    """Give what the workers of prepare pretrain made an index, and put it in its place.

    Args:
        output: their folder.

    Raises:
        FileNotFoundError: there is nothing to merge.
        ValueError: a worker has not finished; the message says which units are missing.
    """
    work = WorkFolder(output)
    for split, files in work.merge().items():
        documents, num_bytes, tokens = (
            sum(getattr(file, name) or 0 for file in files) for name in ("num_documents", "num_bytes", "num_tokens")
        )
        print(
            f"{output / split}: {documents:,} documents, {num_bytes:,} bytes, {tokens:,} tokens in {len(files)} files"
            f" ({num_bytes / tokens:.2f} bytes per token)"
        )


def _open(source: str, name: str | None, subset: str, text_key: str, split: Split, num_processes: int) -> TextSource:
    if source != DOCSTRINGS:
        return open_source(source, name, subset, text_key, split)
    from datamodules.corpus import DocstringSource

    return DocstringSource(split, num_processes)


def _begin(work: WorkFolder, plan: Plan, overwrite: bool, *, wait: bool, make: Callable[[], None]) -> None:
    """Begin the work, unless that is done; with `wait` for a while as long as another one may be doing it."""
    until = time.monotonic() + _BEGINNING_SECONDS
    while not work.is_begun(plan, overwrite):
        try:
            with work.lock("plan"):
                work.begin(plan)
                make()
        except ShardError:
            if not wait or time.monotonic() > until:
                raise
            time.sleep(0.2)


def _make_tokenizer(work: WorkFolder, given: str | None, texts: TextSource, vocab_size: int) -> None:
    """Put the tokenizer into its place, whole."""
    partial = work.tokenizer.with_suffix(".partial")
    if given is None:
        partial.write_text(train_tokenizer(_training_texts(texts), vocab_size).to_str(pretty=True))
    else:
        save_tokenizer(given, partial)
    partial.replace(work.tokenizer)


def _training_texts(texts: TextSource) -> Iterator[str]:
    """The text a tokenizer is trained on: none that is held out, and not more than its merges can profit from."""
    chars = 0
    for unit in range(len(texts.sizes)):
        for document in texts.documents(unit):
            if not document.held_out:
                yield document.text
                chars += len(document.text)
            if chars > _TOKENIZER_CHARS:
                return


def _write(work: WorkFolder, texts: TextSource, units: range, shard_tokens: int, num_processes: int) -> None:
    """Write the parts of these units that are not there yet."""
    with Encoder(work.tokenizer, num_processes) as encoder, _Progress([texts.sizes[u] for u in units]) as progress:
        for number in units:
            with work.lock(f"unit-{number:05d}"):
                unit = work.unit(number)
                if not unit.done:
                    rest = islice(texts.documents(number), unit.num_documents, None)
                    unit.write(encoder.encode(rest), shard_tokens, progress.count)
            progress.finish(texts.sizes[number])


class _Progress:
    """A bar over the bytes of text, with tokens/s; its end is a guess that every finished unit mends.

    Args:
        sizes: bytes of text expected of each unit, 0 where nobody knows.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._known, self._num_units, self._finished = all(sizes), len(sizes), 0
        self._bar = tqdm(total=sum(sizes) if self._known else None, desc="encoding", unit="B", unit_scale=True)
        self._started = time.monotonic()
        self._tokens = self._bytes = self._in_unit = self._unshown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._show()
        self._bar.close()

    def count(self, document: Encoded) -> None:
        """One more document is written."""
        self._tokens += len(document.tokens)
        self._in_unit += document.num_bytes
        self._unshown += document.num_bytes
        if self._unshown > 1_000_000:
            self._show()

    def finish(self, size: int) -> None:
        """A unit of which `size` bytes were expected is written."""
        self._finished += 1
        self._bytes += self._in_unit
        if self._known:
            self._bar.total += self._in_unit - size
        elif self._num_units > 1:  # the others will be like those so far
            self._bar.total = self._bytes * self._num_units // self._finished
        self._in_unit = 0

    def _show(self) -> None:
        rate = self._tokens / (time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
        self._bar.update(self._unshown)
        self._unshown = 0
