"""From tasks to prompts and answers in tokens: what `python cli.py prepare sft` does."""

import heapq
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from datamodules.output_folder import is_done, whole_folder, write_record
from datamodules.sft.examples import EXAMPLES, REFERENCES, Examples, read_references
from datamodules.sft.packing import padding
from datamodules.sft.sources import SPLITS, ExampleSource
from datamodules.sft.tasks import Example, Setting, Task, TaskName, find_task
from datamodules.shards import ShardWriter
from datamodules.tokenizer import describe_tokenizer, end_of_text_id, fingerprint, load_tokenizer, save_tokenizer

_BATCH_CHARS = 2_000_000
# What a model is tested on, unless asked otherwise: so many examples, the draw, what training gives up for them.
TEST_ITEMS, SEED, HELD_OUT = 200, 1234, 0.05
# A prompt that is cut keeps a token from either end.
_LEAST_PROMPT = 3


def prepare_sft(
    output: Path,
    task: TaskName,
    tokenizer: str,
    source: Path | None = None,
    setting: Setting | None = None,
    kind: str | None = None,
    max_new_tokens: int | None = None,
    seq_len: int = 4096,
    test_items: int = TEST_ITEMS,
    seed: int = SEED,
    held_out: float = HELD_OUT,
    test_split: str | None = None,
    chunk_size: int = 16,
    overwrite: bool = False,
) -> None:
    """Turn a task into prompts and answers for fine-tuning: output/{tokenizer.json, train/, val/, test/}.

    An example is the prompt '{kind}: {context} Question: {input} Answer:' (with empty lines between the three), a space
    and its first answer, and an end of text; nothing is put before it. Prompts that are too long lose their middle.
    Examples without context, question or answer are left out, and so are answers that leave no room for a prompt.
    test/references.jsonl keeps the questions and all answers of the test examples, in their order. A second call with
    the same arguments and the same source returns at once; an interrupted one leaves nothing that looks finished.

    Args:
        output: folder to make.
        task: narrativeqa, qmsum, wikisum, or jsonl for rows {context, input, answer} of your own, where a list
            'answers' can take the place of 'answer'.
        tokenizer: that of the pre-training: a tokenizer.json, a SentencePiece .model of the LLaMA kind, the prepared
            folder that holds one of them, or a name on the hub.
        source: folder of .jsonl, .json, .parquet or .arrow files with the columns of the hub's data set, named train*,
            validation*, test*; or a single file. Default: the hub, which needs a network. QMSum's own files are read
            too.
        setting: what NarrativeQA asks about: the summary (default), the text, or full, one after the other.
        kind: what the prompt calls the context. Default: Story, Transcript, Article; Context for jsonl.
        max_new_tokens: tokens to leave free behind a test prompt. Default: 128 for narrativeqa and jsonl, 384 for
            qmsum, 256 for wikisum.
        seq_len: most tokens of an example, T.
        test_items: test examples to draw; 0 takes all.
        seed: of the draw.
        held_out: share of the training contexts that each of validation and test gets where the source has none.
        test_split: split of the source to test on. Default: test, but validation of the hub's QMSum, whose test split
            has no answers; validation is held out from training then.
        chunk_size: what packed examples are padded to, for the report on padding.
        overwrite: replace what a call with other arguments made.

    Raises:
        FileExistsError: output holds something else, and overwrite is not set.
        ValueError: arguments or rows that cannot be used; the message names them.
    """
    started, output = time.monotonic(), Path(output)
    found = find_task(task, setting)
    given = {"kind": kind, "max_new_tokens": max_new_tokens}
    found = replace(found, **{name: value for name, value in given.items() if value is not None})
    _check(found, seq_len, test_items, held_out, chunk_size)
    examples = ExampleSource(found, source, held_out, test_split)
    made_with = {
        "task": task,
        "setting": setting or ("summary" if task == "narrativeqa" else None),
        "source": str(source) if source else found.hub,
        "source_version": examples.version,
        "tokenizer": describe_tokenizer(tokenizer),
        "kind": found.kind,
        "max_new_tokens": found.max_new_tokens,
        "seq_len": seq_len,
        "test_items": test_items,
        "seed": seed,
        "held_out": held_out,
        "test_split": test_split,
    }

    def check() -> None:
        for split in _open(output):
            if overwrite:  # asked for to mend what may be damaged
                split.shards.verify()

    if is_done(output, made_with, overwrite, check):
        print(f"{output} is up to date")
        return
    with whole_folder(output) as folder:
        save_tokenizer(tokenizer, folder / "tokenizer.json")
        encoder = ExampleEncoder(found, load_tokenizer(folder), seq_len)
        counts = {split: _write(folder, split, examples, encoder, test_items, seed) for split in SPLITS}
        for split in _open(folder):
            split.shards.verify()
        write_record(folder, made_with, counts)
    _report(output, counts, seq_len, chunk_size, time.monotonic() - started)


class EncodedExample(NamedTuple):
    """An example in tokens. The answer ends with an end of text."""

    example: Example
    prompt: list[int]
    answer: list[int]


class ExampleEncoder:
    """Prompts and answers in tokens, cut so that both fit into T of them.

    Args:
        task: how prompts are written.
        tokenizer: encodes them.
        seq_len: T.

    Raises:
        ValueError: the tokenizer would make another token of a prompt's end when an answer follows it.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, seq_len: int) -> None:
        self.task, self.seq_len, self._tokenizer = task, seq_len, tokenizer
        self.eos_id, self.vocab_size = end_of_text_id(tokenizer), tokenizer.get_vocab_size()
        self._colon = tokenizer.encode(":", add_special_tokens=False).ids
        if tokenizer.encode(": a", add_special_tokens=False).ids[: len(self._colon)] != self._colon:
            raise ValueError("the tokenizer joins ':' and the space behind it, so prompts cannot end with 'Answer:'")

    def encode(self, examples: Iterable[Example], room_behind: int, counts: Counter[str]) -> Iterator[EncodedExample]:
        """Encode and cut `examples`; count what is cut, and what is left out.

        Args:
            examples: with everything they need.
            room_behind: tokens that must fit behind a prompt, even where its answer has fewer.
            counts: "cut" and "no room" are added to.
        """
        for batch in _batches(examples):
            prompts = self._ids(self.task.prompt(example) for example in batch)
            # encoded behind a colon, as some tokenizers put a space before a text of its own, and others do not
            answers = self._ids(f": {example.answers[0]}" for example in batch)
            for example, prompt, behind in zip(batch, prompts, answers, strict=True):
                answer = [*behind[len(self._colon) :], self.eos_id]
                room = self.seq_len - max(len(answer), room_behind)
                if room < _LEAST_PROMPT:
                    counts["no room"] += 1
                    continue
                counts["cut"] += len(prompt) > room
                yield EncodedExample(example, cut_middle(prompt, room), answer)

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def cut_middle(tokens: list[int], n: int) -> list[int]:
    """`tokens` if they are no more than n; else n - 1 of them, the first (n - 1) // 2 and the others from the end."""
    if len(tokens) <= n:
        return tokens
    first = (n - 1) // 2
    return tokens[:first] + tokens[len(tokens) - (n - 1 - first) :]


def usable_examples(
    source: ExampleSource, split: str, test_items: int, seed: int, counts: Counter[str]
) -> Iterable[Example]:
    """The examples of a split that lack nothing; of "test" those that `draw` takes.

    Args:
        source: of all examples.
        split: "train", "val" or "test".
        test_items: as of `draw`.
        seed: as of `draw`.
        counts: "no context", "no input" and "no answer" are added to.
    """
    usable = _usable(source.examples(split), counts)
    return draw(usable, test_items, seed) if split == "test" else usable


def draw(examples: Iterable[Example], items: int, seed: int) -> Iterable[Example]:
    """`items` of the examples (all if there are no more, or if it is 0) in their order; the seed decides which."""
    if not items:
        return examples
    generator = random.Random(seed)
    lots = ((generator.random(), number, example) for number, example in enumerate(examples))
    return [example for _, _, example in sorted(heapq.nsmallest(items, lots), key=lambda lot: lot[1])]


def _check(task: Task, seq_len: int, test_items: int, held_out: float, chunk_size: int) -> None:
    if not 0 < held_out < 0.5:
        raise ValueError(f"held_out={held_out} must lie between 0 and 0.5: validation and test may each need it")
    if test_items < 0 or task.max_new_tokens < 1:
        raise ValueError(f"{test_items=} must be at least 0, max_new_tokens={task.max_new_tokens} at least 1")
    if seq_len < task.max_new_tokens + _LEAST_PROMPT:
        raise ValueError(f"{seq_len=} leaves no room for a prompt before max_new_tokens={task.max_new_tokens}")
    if chunk_size < 1 or seq_len % chunk_size:
        raise ValueError(f"{chunk_size=} must divide {seq_len=}")


def _write(
    folder: Path, split: str, source: ExampleSource, encoder: ExampleEncoder, test_items: int, seed: int
) -> dict[str, int]:
    """Encode `split` into folder/split; what is in it, and what was left out."""
    counts: Counter[str] = Counter()
    examples = usable_examples(source, split, test_items, seed, counts)
    lengths, references = [], []
    with ShardWriter(
        folder / split,
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        tokenizer_sha256=fingerprint(folder / "tokenizer.json"),
    ) as writer:
        room_behind = encoder.task.max_new_tokens if split == "test" else 0
        shown = tqdm(examples, desc=f"encoding {split}", unit="example")
        for example, prompt, answer in encoder.encode(shown, room_behind, counts):
            writer.write(prompt + answer)
            lengths.append((len(prompt), len(answer)))
            if split == "test":
                references.append({"index": len(references), "input": example.input, "answers": example.answers})
        if not lengths:
            why = ", ".join(f"{count} have no {name.removeprefix('no ')}" for name, count in counts.items())
            raise ValueError(f"no example is left for {split} ({why or 'none came'}): see --held_out, --test_split")
    np.save(folder / split / EXAMPLES, np.array(lengths, dtype=np.uint32))
    if split == "test":
        lines = (json.dumps(reference, ensure_ascii=False) + "\n" for reference in references)
        (folder / split / REFERENCES).write_text("".join(lines), encoding="utf-8")
    return {"examples": len(lengths), "tokens": int(np.sum(lengths)), **counts}


def _usable(examples: Iterable[Example], counts: Counter[str]) -> Iterator[Example]:
    for example in examples:
        if lacks := example.lacks():
            counts[f"no {lacks}"] += 1
        else:
            yield example._replace(answers=[answer.strip() for answer in example.answers if answer.strip()])


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples with about _BATCH_CHARS together, enough to keep all cores at work."""
    batch: list[Example] = []
    chars = 0
    for example in examples:
        batch.append(example)
        chars += len(example.context)
        if chars > _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def _open(folder: Path) -> list[Examples]:
    sha256 = fingerprint(folder / "tokenizer.json")
    splits = [Examples(folder / split, sha256) for split in SPLITS]
    read_references(folder / "test", len(splits[-1]))
    return splits


def _report(output: Path, counts: dict[str, dict[str, int]], seq_len: int, chunk_size: int, seconds: float) -> None:
    for split, examples in zip(SPLITS, _open(output), strict=True):
        count: dict[str, Any] = dict(counts[split])
        print(
            f"{output / split}: {count.pop('examples'):,} examples, {count.pop('tokens'):,} tokens,"
            f" {count.pop('cut', 0):,} prompts cut"
            + "".join(f", {number:,} left out for want of {name[3:]}" for name, number in count.items())
        )
        print(f"  {padding(examples.lengths.sum(axis=1), seq_len, chunk_size)}")
    print(f"prepared in {seconds:.0f} s")
