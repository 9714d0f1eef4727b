"""Needles in a haystack, in the style of RULER (Hsieh et al., arXiv 2404.06654)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.resumable import check_at_least
from datamodules.synthetic.task import Sample, Task, fill_up
from datamodules.synthetic.words import SENTENCES, Kind, draw_names, how_many
from datamodules.tokenizer import describe_tokenizer, end_of_text_id, load_tokenizer

Variant = Literal["single", "multi_key", "multi_value", "multi_query"]
_PROBES = 32


class Codec(NamedTuple):
    """How text becomes ids below `vocab_size`; `locate` tells which token holds each of some characters of a text."""

    encode: Callable[[str], Sequence[int]]
    locate: Callable[[str, Sequence[int]], Sequence[int]]
    vocab_size: int
    eos_id: int


@cache
def codec(tokenizer: Path | None) -> Codec:
    """That of a tokenizer.json; or UTF-8 bytes, and 256 for the end of text."""
    if tokenizer is None:
        return Codec(str.encode, lambda _, characters: characters, 257, 256)  # the texts are ASCII
    loaded = load_tokenizer(tokenizer)
    encode = partial(loaded.encode, add_special_tokens=False)
    return Codec(
        lambda text: encode(text).ids,
        lambda text, characters: list(map(encode(text).char_to_token, characters)),
        loaded.get_vocab_size(),
        end_of_text_id(loaded),
    )


@cache
def sentence_tokens(tokenizer: Path | None) -> NDArray[np.int64]:
    """How many tokens each of SENTENCES takes on its own."""
    return np.array([len(codec(tokenizer).encode(f" {sentence}")) for sentence in SENTENCES])


class Story(NamedTuple):
    """What is drawn of a sample: the needles, where they stand (N,) from 0 to 1, in which order they do, and which are
    asked for, in the order of the answer."""

    keys: list[str]
    values: list[str]
    depths: NDArray[np.float64]
    order: NDArray[np.int64]
    asked: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """Sentences of noise with needles among them, 'The special magic number for brisk-otter is 4096123.', then a
    question; the answer, with an end of text behind it, is the values asked for. Noise fills the sequence as far as
    whole sentences can, and the little room left is behind the answer.

    single: one needle. multi_key: needles of several keys, one of which is asked for. multi_value: one key with several
    values, to be told in the order of the text. multi_query: several keys, all asked for, to be told in the order of
    the question. RULER takes the values in any order, and gives other words to the text.

    Attributes:
        variant: see above.
        num_needles: needles of a sample; `single` has one whatever this says.
        key_kind: what keys are: words (an adjective and a noun), numbers or uuids.
        value_kind: what values are.
        num_digits: of numbers.
        depth: where the needles asked for stand, from 0, before all noise, to 1, behind it. null for anywhere, each on
            its own, as the distracting needles of multi_key always are.
        tokenizer: a tokenizer.json, or the prepared folder that holds one. null for bytes.

    Raises:
        ValueError: numbers out of range, more needles than there are keys or values, or no tokenizer.
        FileNotFoundError: the tokenizer does not exist.
    """

    variant: Variant = "single"
    num_needles: int = 4
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    num_digits: int = 7
    depth: float | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        check_at_least(1, num_needles=self.num_needles, num_digits=self.num_digits)
        if self.num_digits > 18:
            raise ValueError(f"num_digits={self.num_digits} must be at most 18")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth} must lie between 0 and 1")
        for name, kind, needed in (("keys", self.key_kind, self._num_keys), ("values", self.value_kind, self._count)):
            if (there_are := how_many(kind, self.num_digits)) < needed:
                raise ValueError(f"{needed} needles need different {name}, and there are only {there_are} {kind}")

    @property
    def vocab_size(self) -> int:
        """That of the tokenizer, or 257."""
        return codec(self.tokenizer).vocab_size

    @property
    def eos_id(self) -> int:
        """The tokenizer's end of text, or 256."""
        return codec(self.tokenizer).eos_id

    @cached_property
    def min_seq_len(self) -> int:
        """Room for needles and question without noise. Samples of a tokenizer differ: the most of a few of them."""
        rng = np.random.default_rng(0)
        return max(self._room(self._story(rng), []) for _ in range(_PROBES))

    def identity(self) -> str:
        """See `Task.identity`: the tokenizer by its content, wherever it lies."""
        if self.tokenizer is None:
            return repr(self)
        return f"{replace(self, tokenizer=None)} of tokenizer {describe_tokenizer(self.tokenizer)}"

    def draw(self, rng: np.random.Generator, seq_len: int) -> Sample:
        """See `Task.draw`."""
        story = self._story(rng)
        # the rare one that takes more tokens than all that were probed
        while (room := self._room(story, [])) > seq_len:
            story = self._story(rng)
        drawn = rng.integers(len(SENTENCES), size=seq_len)
        noise = [SENTENCES[i] for i in drawn]
        # encoded together they may take other tokens than one by one
        n = int(np.searchsorted(np.cumsum(sentence_tokens(self.tokenizer)[drawn]), seq_len - room, side="right"))
        while self._room(story, noise[:n]) > seq_len:
            n -= 1
        while self._room(story, noise[: n + 1]) <= seq_len:
            n += 1
        said = self._said(story, *self._text(story, noise[:n]))
        return fill_up(*self._encoded(story, noise[:n]), said, self._count, self.eos_id, seq_len)

    @property
    def _count(self) -> int:
        return 1 if self.variant == "single" else self.num_needles

    @property
    def _num_keys(self) -> int:
        return 1 if self.variant == "multi_value" else self._count

    def _story(self, rng: np.random.Generator) -> Story:
        count = self._count
        keys = draw_names(rng, self.key_kind, self._num_keys, self.num_digits) * (count // self._num_keys)
        values = draw_names(rng, self.value_kind, count, self.num_digits)
        asked = rng.permutation(count)[: 1 if self.variant == "multi_key" else count]
        depths = rng.random(count)
        if self.depth is not None:
            depths[asked] = self.depth
        order = np.argsort(depths, kind="stable")
        return Story(keys, values, depths, order, order if self.variant == "multi_value" else asked)

    @property
    def _magic(self) -> str:
        return f"special magic {self.value_kind.removesuffix('s')}"

    def _needle(self, story: Story, i: int) -> str:
        return f"The {self._magic} for {story.keys[i]} is {story.values[i]}."

    def _text(self, story: Story, noise: list[str]) -> tuple[str, str]:
        """Prompt and answer."""
        parts, told = [], 0
        for i in story.order:
            place = round(story.depths[i] * len(noise))
            parts += [*noise[told:place], self._needle(story, i)]
            told = place
        text = " ".join([*parts, *noise[told:]])
        plural, are = ("s", "are") if len(story.asked) > 1 else ("", "is")
        asked = f"{self._magic}{plural} for " + ", ".join(dict.fromkeys(story.keys[i] for i in story.asked))
        prompt = f"{text}\nWhat {are} the {asked}? The {asked} {are}"
        return prompt, " " + ", ".join(story.values[i] for i in story.asked)

    def _said(self, story: Story, prompt: str, answer: str) -> NDArray[np.int64]:
        """Where in the prompt each token of the answer stands, -1 for those of no value."""
        encode, locate, *_ = codec(self.tokenizer)
        in_prompt, firsts, lasts, start = [], [], [], len(" ")
        for i in story.asked:
            needle, length = self._needle(story, i), len(story.values[i])
            in_prompt.append(prompt.index(needle) + len(needle) - len(".") - length)
            firsts.append(start)
            lasts.append(start + length - 1)
            start += length + len(", ")
        said = np.full(len(encode(answer)), -1)
        tokens = zip(locate(prompt, in_prompt), locate(answer, firsts), locate(answer, lasts), strict=True)
        for place, first, last in tokens:
            said[first : last + 1] = place + np.arange(last + 1 - first)
        return said

    def _encoded(self, story: Story, noise: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        encode = codec(self.tokenizer).encode
        prompt, answer = (np.array(list(encode(text)), dtype=np.int64) for text in self._text(story, noise))
        return prompt, answer

    def _room(self, story: Story, noise: list[str]) -> int:
        return sum(map(len, self._encoded(story, noise)))
