"""How likely a model finds continuations of contexts, however long both are; and what it writes itself."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rat.generation import Stop
from rat.model import IGNORED, CausalLM

# Rows times tokens that go through the model at once, which bounds the activations however long the rows are.
TOKENS_AT_ONCE = 16384


class Request(NamedTuple):
    """Tokens whose likelihood is asked, and at least one token before them."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether greedy decoding would write it."""

    log_likelihood: float
    is_greedy: bool


class Scorer(Protocol):
    """A language model as evaluation sees it."""

    vocab_size: int

    def score_batch(self, requests: Sequence[Request]) -> list[Score]:
        """The scores of requests that go through the model side by side."""

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_id: int | None, stop: Stop
    ) -> list[list[int]]:
        """Greedy continuations of prompts side by side, without them; see `CausalLM.generate`."""


def score(model: Scorer, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[int, Score]]:
    """Score requests of any lengths.

    Args:
        model: the language model.
        requests: in any order; ones of the same context are cheapest together.
        batch_size: so many go through the model side by side.

    Yields:
        The place of a request and its score, batch by batch, the longest contexts first.

    Raises:
        ValueError: a context or continuation is empty, or a token is outside the vocabulary.
    """
    for i, request in enumerate(requests):
        for name, tokens in request._asdict().items():
            if not tokens:
                raise ValueError(f"request {i} has an empty {name}: it needs at least one token")
            worst = max(max(tokens), -1 - min(tokens))
            if worst >= model.vocab_size or min(tokens) < 0:
                wrong = max(tokens) if max(tokens) >= model.vocab_size else min(tokens)
                raise ValueError(f"request {i} holds token {wrong}, the vocabulary has 0 to {model.vocab_size - 1}")

    def order(i: int) -> tuple[int, tuple[int, ...], int]:
        context, continuation = requests[i]
        return -len(context), tuple(context), -len(continuation)

    ordered = sorted(range(len(requests)), key=order)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        yield from zip(batch, model.score_batch([requests[i] for i in batch]), strict=True)


class RatScorer:
    """A `CausalLM` that reads a context once for all its continuations and carries its state on.

    Nothing is cut: every token is predicted from all that stands before it, in pieces that bound the memory.

    Args:
        model: on its device, in its dtype, in evaluation mode.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.vocab_size = model.config.vocab_size

    @torch.inference_mode()
    def score_batch(self, requests: Sequence[Request]) -> list[Score]:
        """See `Scorer.score_batch`."""
        # The context's last token predicts the continuation's first, so it is read with it.
        prefixes: dict[tuple[int, ...], int] = {}
        rows = [prefixes.setdefault(tuple(context[:-1]), len(prefixes)) for context, _ in requests]
        longest = max(len(continuation) for _, continuation in requests)
        state = self.model.new_state(len(prefixes), max(map(len, prefixes)) + longest)
        ids, _, lengths = self._pad(list(prefixes))
        for piece, left in _pieces(ids, lengths):
            self.model.advance(ids[:, piece], state, left)
        if len(prefixes) < len(rows):
            state = [part.select(torch.tensor(rows, device=part.lengths.device)) for part in state]
        inputs, targets, lengths = self._pad(
            [[context[-1], *continuation[:-1]] for context, continuation in requests],
            [continuation for _, continuation in requests],
        )
        total = torch.zeros(len(requests), dtype=torch.float64)
        greedy = torch.ones(len(requests), dtype=torch.bool)
        for piece, left in _pieces(inputs, lengths):
            likelihood, likeliest = self.model.score(inputs[:, piece], targets[:, piece], state, left)
            total += likelihood.double().sum(1).cpu()
            greedy &= likeliest.all(1).cpu()
        return [Score(*pair) for pair in zip(total.tolist(), greedy.tolist(), strict=True)]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_id: int | None, stop: Stop
    ) -> list[list[int]]:
        """See `Scorer.generate`."""
        return self.model.generate(prompts, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id, stop=stop)

    def _pad(
        self, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and their targets side by side, padded on the right, (B, T) each; the rows' lengths (B,)."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
        padded = torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in targets], dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows])
        device = self.model.embedding.weight.device
        return ids.to(device), padded.to(device), lengths.to(device)


def _pieces(ids: Tensor, lengths: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Where to cut padded rows (B, T), and how much of each piece is a row's own; None if all of it is."""
    width = max(1, TOKENS_AT_ONCE // len(ids))
    for start in range(0, ids.shape[1], width):
        stop = min(start + width, ids.shape[1])
        left = (lengths - start).clamp(0, stop - start)
        yield slice(start, stop), None if bool((left == stop - start).all()) else left
