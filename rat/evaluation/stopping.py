"""Where generated text ends: at strings, which tokens need not line up with."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders


class StopStrings:
    """Watches rows of tokens as they are drawn, and ends each after the first of the strings it writes.

    Args:
        tokenizer: turns tokens into text.
        strings: any of them ends a row; special tokens are no text.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = [text for text in strings if text]
        self.reach = max(map(len, self.strings), default=0)
        self.streams: dict[int, decoders.DecodeStream] = {}
        self.tails: dict[int, str] = {}

    def __call__(self, row: int, token: int) -> bool:
        """Whether the row's text holds one of the strings, now that it has drawn this token."""
        if not self.strings:
            return False
        stream = self.streams.setdefault(row, decoders.DecodeStream(skip_special_tokens=True))
        piece = stream.step(self.tokenizer, token)
        if not piece:
            return False
        text = self.tails.get(row, "") + piece
        self.tails[row] = text[-self.reach :]
        return any(string in text for string in self.strings)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of a row's tokens, up to and without the first of the strings."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text[: min((text.find(string) for string in self.strings if string in text), default=None)]
