"""A session as text: what is said to the model, what it answers, and a terminal to do both by turns."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import torch
from tokenizers import Tokenizer

from rat.generation import Sampling
from rat.session import Session
from rat_cli.text_stream import decoded

# Stands before a text that goes on another: some tokenizers put a space before a text of its own.
_BEFORE = ":"


class Conversation:
    """One text that a person and a model write by turns.

    Args:
        session: the text so far, which may be empty.
        vocabulary: of the model.
        sampling: how its tokens are drawn.
        max_new_tokens: of an answer, at most.
        eos_token_id: ends an answer.
        generator: of the draws.

    Raises:
        ValueError: a negative number of tokens.
    """

    def __init__(
        self,
        session: Session,
        vocabulary: Tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        eos_token_id: int | None,
        generator: torch.Generator,
    ) -> None:
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        self.session, self.vocabulary = session, vocabulary
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.eos_token_id, self.generator = eos_token_id, generator

    def say(self, text: str) -> None:
        """Go on with `text`."""
        self.session.add(encoded(self.vocabulary, text, behind=bool(self.session.tokens)))

    def answer(self, stopped: Sequence[int] = ()) -> None:
        """Let the model write, and print it as it comes; no more of it once something is in `stopped`."""
        before = list(self.session.tokens)
        tokens = self.session.write(self.max_new_tokens, self.sampling, self.eos_token_id, self.generator)
        for piece in decoded(self.vocabulary, _until(tokens, stopped), after=before):
            print(piece, end="", flush=True)
        print()

    def converse(self) -> None:
        """Answer every line that comes in, as a new line of the text, until there are no more.

        An empty line lets the model go on by itself. Ctrl-C ends an answer between two tokens (a second one interrupts
        at once), and at a terminal it drops the line being written.
        """
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            with suppress(ImportError):  # Python may be built without it; lines are edited by the terminal then
                import readline  # noqa: F401
            print("Ctrl-C stops an answer, an empty line goes on with it, Ctrl-D leaves", file=sys.stderr)
        while True:
            try:
                line = input("> " if at_terminal else "")
            except EOFError:
                if at_terminal:
                    print()
                return
            except KeyboardInterrupt:
                print()
                continue
            if line:
                self.say("\n" * bool(self.session.tokens) + line)
            if self.session.tokens:
                with _ctrl_c() as pressed:
                    self.answer(pressed)


def encoded(vocabulary: Tokenizer, text: str, behind: bool = False) -> list[int]:
    """The tokens of `text`, as they are in front of a document or, with `behind`, in the middle of one."""
    tokens = vocabulary.encode(text, add_special_tokens=False).ids
    if not behind:
        return tokens
    before = vocabulary.encode(_BEFORE, add_special_tokens=False).ids
    both = vocabulary.encode(_BEFORE + text, add_special_tokens=False).ids
    return both[len(before) :] if both[: len(before)] == before else tokens


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """What Ctrl-C fills once instead of interrupting: a step that is cut short would leave a state of two lengths."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _until(tokens: Iterator[int], stopped: Sequence[int]) -> Iterator[int]:
    for token in tokens:
        yield token
        if stopped:
            return
