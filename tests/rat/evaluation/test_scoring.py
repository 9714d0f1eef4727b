"""Log-likelihoods: in any company, in pieces, behind any padding, those of a full pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rat import CausalLM
from rat.evaluation import scoring
from rat.evaluation.scoring import RatScorer, Request, Score, score

PATTERNS = [("rat",), ("rat", "sliding_window"), ("attention", "sliding_window"), ("rnn",), ("rnn", "rat", "attention")]
# Contexts of one token and of many, some with several continuations; token 0 is left to the padding.
LENGTHS = [(1, 3), (9, 1), (9, 6), (9, 2), (14, 5), (3, 17), (1, 30), (22, 1)]


@pytest.fixture(params=PATTERNS, ids="-".join)
def model(request: pytest.FixtureRequest, make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model(*request.param).eval()


@pytest.fixture
def requests(random_ids: Callable[..., Tensor]) -> list[Request]:
    def draw(length: int, seed: int) -> list[int]:
        return random_ids(length, seed=seed).clamp(min=1).tolist()

    return [Request(draw(c, seed=c), draw(n, seed=100 + i)) for i, (c, n) in enumerate(LENGTHS)]


@torch.no_grad()
def full_pass(model: CausalLM, request: Request) -> Score:
    """The log-softmax of everything at once."""
    context, continuation = request
    logits = model(torch.tensor([[*context, *continuation]]))[0, len(context) - 1 : -1].log_softmax(-1)
    target = torch.tensor(continuation)
    return Score(float(logits.gather(1, target[:, None]).sum()), bool((logits.argmax(1) == target).all()))


def found(model: CausalLM, requests: list[Request], batch_size: int) -> list[Score]:
    places = dict(score(RatScorer(model), requests, batch_size))
    assert sorted(places) == list(range(len(requests)))
    return [places[i] for i in range(len(requests))]


@pytest.mark.parametrize("tokens", [10_000, 20])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_pieces_and_shared_contexts_change_nothing(
    model: CausalLM, requests: list[Request], batch_size: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", tokens)
    expected = [full_pass(model, request) for request in requests]
    for actual, wanted in zip(found(model, requests, batch_size), expected, strict=True):
        assert actual.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-5, abs=1e-5)
        assert actual.is_greedy == wanted.is_greedy


def test_what_the_model_would_write_is_greedy(model: CausalLM, requests: list[Request]) -> None:
    own = model.generate([context for context, _ in requests], max_new_tokens=4)
    greedy = [Request(context, text) for (context, _), text in zip(requests, own, strict=True)]
    almost = [Request(context, [*text[:-1], (text[-1] + 1) % 40]) for context, text in greedy]
    assert [answer.is_greedy for answer in found(model, greedy + almost, 16)] == [True] * 8 + [False] * 8


def test_padding_leaves_no_trace(model: CausalLM, requests: list[Request]) -> None:
    expected = found(model, requests, 100)

    def poison(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Padding is token 0, which no request holds."""
        return torch.where((inputs[0] == 0)[..., None], torch.full_like(output, 1e4), output)

    model.embedding.register_forward_hook(poison)
    assert found(model, requests, 100) == expected


def test_each_context_is_read_once_for_all_its_continuations(
    make_model: Callable[..., CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shapes = make_model("rat").eval(), []
    advance = model.advance
    monkeypatch.setattr(model, "advance", lambda ids, *rest: (shapes.append(tuple(ids.shape)), advance(ids, *rest))[1])
    found(model, [Request([1, 2, 3, 4], [5, 6]), Request([1, 2, 3, 4], [7]), Request([1, 2, 3, 4], [8])], 3)
    assert shapes == [(1, 3), (3, 2)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), "request 1 has an empty context"),
        (Request([1], []), "request 1 has an empty continuation"),
        (Request([1, 40], [1]), "request 1 holds token 40, the vocabulary has 0 to 39"),
        (Request([1], [2, -3]), "request 1 holds token -3, the vocabulary has 0 to 39"),
    ],
)
def test_what_cannot_be_scored_is_named(make_model: Callable[..., CausalLM], request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(score(RatScorer(make_model("rat")), [Request([1], [2]), request_], 4))
