"""Loss by position: what a full pass gives, whatever the pieces; spans and intervals by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rat import CausalLM
from rat.evaluation import lengths
from rat.evaluation.lengths import Span, loss_by_position, span, spans


@pytest.mark.parametrize("pattern", [("rat", "sliding_window"), ("attention", "rnn")])
@pytest.mark.parametrize("at_once", [3, 20, 1000])
@torch.no_grad()
def test_the_loss_is_that_of_a_full_pass(
    make_model: Callable[..., CausalLM],
    random_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    pattern: tuple[str, ...],
    at_once: int,
) -> None:
    monkeypatch.setattr(lengths, "TOKENS_AT_ONCE", at_once)
    model, tokens = make_model(*pattern), random_ids(3, 31)
    expected = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(loss_by_position(model, tokens), expected, rtol=1e-4, atol=1e-5)


def test_pieces_are_no_larger_than_allowed(
    make_model: Callable[..., CausalLM], random_ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "TOKENS_AT_ONCE", 12)
    model, read = make_model("rat"), []
    score = model.score
    monkeypatch.setattr(model, "score", lambda ids, *rest: (read.append(tuple(ids.shape)), score(ids, *rest))[1])
    loss_by_position(model, random_ids(3, 11))
    assert read == [(3, 4), (3, 4), (3, 2)]


def test_a_span_by_hand() -> None:
    losses = torch.tensor([[9.0, 1.0, 3.0, 9.0], [9.0, 2.0, 6.0, 9.0]])
    # the texts' means are 2 and 4, their standard error is 1
    assert span(losses, 2, 3) == Span(2, 3, 3.0, pytest.approx(1.96))
    assert span(losses[:1], 2, 3) == Span(2, 3, 2.0, None)


def test_spans_cover_every_position_once_and_double() -> None:
    losses = torch.arange(1.0, 101).expand(2, -1)
    found = spans(losses, per_octave=1)
    assert [(entry.first, entry.last) for entry in found] == [
        (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 100),
    ]  # fmt: skip
    assert [entry.loss for entry in found] == [(entry.first + entry.last) / 2 for entry in found]
    for length in (1, 2, 3, 64, 1000):
        for per_octave in (1, 3, 8):
            found = spans(torch.zeros(2, length), per_octave)
            covered = [i for entry in found for i in range(entry.first, entry.last + 1)]
            assert covered == list(range(1, length + 1))
            assert len(found) <= per_octave * math.log2(length) + 2
    with pytest.raises(ValueError, match="per_octave must be at least 1, got 0"):
        spans(losses, 0)
