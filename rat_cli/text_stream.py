"""Tokens as text, while they come."""

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

# Stands for bytes that are no character, or not yet.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# So many of the tokens before decide how the first one looks: with a space in front or without.
_CONTEXT = 8


def decoded(vocabulary: Tokenizer, tokens: Iterator[int | None], after: Sequence[int] = ()) -> Iterator[str]:
    """The text of `tokens` piece by piece, whole characters only; the special ones and None are left out.

    The library's own DecodeStream raises where bytes that are no text come back to back, which a model may write, and
    keeps what stands before an unfinished character at the end to itself.

    Args:
        vocabulary: that decodes them.
        tokens: as they are drawn.
        after: the tokens in front of them: LLaMA's tokenizers drop a space at the beginning of a text alone.
    """
    window = list(after[-_CONTEXT:])
    known, text = len(window), vocabulary.decode(window)
    shown = len(text)
    for token in tokens:
        if token is None:
            continue
        window.append(token)
        text = vocabulary.decode(window)
        if len(text) > shown and not text.endswith(_UNFINISHED):
            yield text[shown:]
            window = window[known:]
            known, text = len(window), vocabulary.decode(window)
            shown = len(text)
    if rest := text[shown:].rstrip(_UNFINISHED):
        yield rest
