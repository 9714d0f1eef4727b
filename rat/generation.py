"""Text from a model: prompts of any lengths side by side, one state, one token a row and step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rat.config import ModelConfig
from rat.layers import LayerState

Prompt = Sequence[int] | Tensor
# Told the row and the token that it drew; whether the row is finished by that.
Stop = Callable[[int, int], bool]

# Prompts go in by pieces of this many tokens, which bounds the activations however long they are.
PREFILL_TOKENS = 4096


# Below this, logits divided by the temperature overflow, and the likeliest token has all the probability anyway.
_COLDEST = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from its logits; the defaults are greedy.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens can be drawn.
        top_p: only the smallest set of likeliest tokens whose probabilities reach p can be drawn.
        repetition_penalty: logits of tokens that the row already holds, prompt included, are divided by it where
            positive and multiplied where negative (CTRL, arXiv 1909.05858); 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raise a ValueError that names the field out of range."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def draw(self, logits: Tensor, seen: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token a row: logits (B, V) and the tokens each row holds, bool (B, V) -> (B,) int64."""
        logits = logits.float()
        if self.repetition_penalty != 1:
            factor = torch.where(logits > 0, 1 / self.repetition_penalty, self.repetition_penalty)
            logits = torch.where(seen, logits * factor, logits)
        if self.temperature < _COLDEST:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p is not None:
            logits = _nucleus(logits, self.top_p)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _nucleus(logits: Tensor, p: float) -> Tensor:
    """Drop every token that comes after the likeliest ones have reached p together; (B, V)."""
    ordered, order = logits.sort(descending=True)
    probability = ordered.softmax(-1)
    dropped = probability.cumsum(-1) - probability >= p
    dropped[:, 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


class Past(Protocol):
    """A text that the model has read already, all of it, in a state of one row: see `rat.session`."""

    tokens: list[int]
    state: list[LayerState]


class Generator(nn.Module):
    """`generate` and `stream` for a model with `new_state` and `step`."""

    config: ModelConfig

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        stop: Stop | None = None,
        generator: torch.Generator | None = None,
        past: Past | None = None,
    ) -> list[list[int]]:
        """Continue every prompt; the arguments are those of `stream`.

        Returns:
            For each prompt its new tokens, without the prompt, up to and with the one that finished it.
        """
        texts: list[list[int]] = [[] for _ in prompts]
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        for step in self._stream(prompts, max_new_tokens, sampling, eos_token_id, stop, generator, past):
            for text, token in zip(texts, step, strict=True):
                if token is not None:
                    text.append(token)
        return texts

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        stop: Stop | None = None,
        generator: torch.Generator | None = None,
        past: Past | None = None,
    ) -> Iterator[list[int | None]]:
        """Continue prompts of any lengths together and hand out each token as it is drawn.

        Args:
            prompts: token ids, at least one in each; lengths may differ.
            max_new_tokens: at most so many for each prompt.
            temperature: 0 for greedy decoding.
            top_k: keep the k likeliest tokens.
            top_p: keep the likeliest tokens that reach probability p together.
            repetition_penalty: above 1 discourages tokens that the row already holds.
            eos_token_id: a row that draws it is finished.
            stop: told each row's number and the token it drew; a row for which it is true is finished.
            generator: of the draws, on the model's device; torch's global one by default.
            past: what every prompt follows; it stays as it is, and is not read again.

        Yields:
            One token for each prompt, None for those that are finished.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, a setting out of range.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
        return self._stream(prompts, max_new_tokens, sampling, eos_token_id, stop, generator, past)

    def _stream(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling,
        eos_token_id: int | None,
        stop: Stop | None,
        generator: torch.Generator | None,
        past: Past | None,
    ) -> Iterator[list[int | None]]:
        if eos_token_id is not None and not 0 <= eos_token_id < self.config.vocab_size:
            raise ValueError(f"eos_token_id {eos_token_id} lies outside the vocabulary of {self.config.vocab_size}")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        ids, lengths = pad_prompts(prompts, self.config.vocab_size, next(self.parameters()).device)
        return self._decode(ids, lengths, max_new_tokens, sampling, eos_token_id, stop, generator, past)

    @torch.inference_mode()
    def _decode(
        self,
        ids: Tensor,
        lengths: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        eos_token_id: int | None,
        stop: Stop | None,
        generator: torch.Generator | None,
        past: Past | None,
    ) -> Iterator[list[int | None]]:
        count = len(ids)
        if not (count and max_new_tokens):
            return
        state: list[LayerState]
        if past is None:
            state = self.new_state(count, ids.shape[1] + max_new_tokens)  # type: ignore[operator]
        else:
            state = [part.select(torch.zeros(count, dtype=torch.long, device=ids.device)) for part in past.state]
        logits = self.prefill(ids, lengths, state)
        own = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        seen = torch.zeros(count, self.config.vocab_size + 1, dtype=torch.bool, device=ids.device)
        seen = seen.scatter(1, torch.where(own, ids, self.config.vocab_size), True)[:, :-1]
        if past is not None:
            seen[:, past.tokens] = True
        open_rows = list(range(count))
        for made in range(1, max_new_tokens + 1):
            token = sampling.draw(logits, seen, generator)
            drawn = dict(zip(open_rows, token.tolist(), strict=True))
            yield [drawn.get(row) for row in range(count)]
            alive = [
                i
                for i, row in enumerate(open_rows)
                if drawn[row] != eos_token_id and not (stop is not None and stop(row, drawn[row]))
            ]
            if not alive or made == max_new_tokens:
                return
            if len(alive) < len(open_rows):
                kept = torch.tensor(alive, device=ids.device)
                open_rows = [open_rows[i] for i in alive]
                token, seen = token[kept], seen[kept]
                state = [part.select(kept) for part in state]
            seen = seen.scatter(1, token[:, None], True)
            logits = self.step(token[:, None], state)  # type: ignore[operator]

    def prefill(self, ids: Tensor, lengths: Tensor, state: list[LayerState]) -> Tensor:
        """Read prompts (B, T), padded on the right, of (B,) tokens each; logits (B, V) after each row's last one.

        They go in by pieces of PREFILL_TOKENS; the state is advanced in place.
        """
        logits: Tensor | None = None
        for start in range(0, ids.shape[1], PREFILL_TOKENS):
            piece = ids[:, start : start + PREFILL_TOKENS]
            left = lengths - start
            rows = left > 0
            whole = bool((left >= piece.shape[1]).all())
            new = self.step(piece, state, None if whole else left.clamp(0, piece.shape[1]))  # type: ignore[operator]
            logits = new if logits is None else torch.where(rows[:, None], new, logits)
        assert logits is not None
        return logits


def pad_prompts(prompts: Sequence[Prompt], vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts side by side, padded on the right: ids (B, T) and lengths (B,).

    Raises:
        ValueError: a prompt is empty, is not one sequence of ids, or names a token outside the vocabulary.
    """
    rows = []
    for i, prompt in enumerate(prompts):
        try:
            row = torch.as_tensor(prompt)
        except (TypeError, ValueError):
            raise ValueError(f"prompt {i} must be a sequence of token ids, got {str(prompt)[:40]!r}") from None
        if row.ndim != 1 or not len(row):
            raise ValueError(f"prompt {i} must be a sequence of at least one token id, got shape {tuple(row.shape)}")
        if row.is_floating_point():
            raise ValueError(f"prompt {i} must hold whole numbers, got {row.dtype}")
        rows.append(row := row.long())
        if row.min() < 0 or row.max() >= vocab_size:
            worst = int(row.max() if row.max() >= vocab_size else row.min())
            raise ValueError(f"prompt {i} holds token {worst}, the vocabulary has 0 to {vocab_size - 1}")
    if not rows:
        return torch.zeros(0, 1, dtype=torch.long, device=device), torch.zeros(0, dtype=torch.long, device=device)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    return ids, torch.tensor([len(row) for row in rows], device=device)
