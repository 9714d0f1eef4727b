"""Generation: prompts side by side, every way to draw, ends, streams and refusals."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rat import CausalLM, generation
from rat.generation import Sampling

V = 40
PATTERNS = [("rat",), ("rat", "sliding_window"), ("attention", "sliding_window"), ("rnn", "rat")]
PROMPTS = [[5], [1, 2, 3], list(range(4)), list(range(30, 9, -1)), [7, 7], list(range(9))]


def naive(model: CausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding by a full pass for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def probabilities(
    logits: list[float],
    seen: set[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> list[float]:
    """The distribution that a token is to be drawn from, in plain Python."""
    r = repetition_penalty
    logits = [x if i not in seen else x / r if x > 0 else x * r for i, x in enumerate(logits)]
    weights = {i: math.exp((x - max(logits)) / temperature) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: -weights[i])[:top_k]
    if top_p is not None:
        total, reached = sum(weights[i] for i in ranked), 0.0
        for count, i in enumerate(ranked, 1):
            reached += weights[i] / total
            if reached >= top_p:
                ranked = ranked[:count]
                break
    total = sum(weights[i] for i in ranked)
    return [weights[i] / total if i in ranked else 0.0 for i in range(len(logits))]


@pytest.fixture(params=PATTERNS, ids="-".join)
def model(request: pytest.FixtureRequest, make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model(*request.param)


@pytest.fixture
def rat(make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model("rat", "sliding_window")


@torch.no_grad()
def test_prompts_together_equal_each_prompt_alone_and_full_passes(model: CausalLM) -> None:
    together = model.generate(PROMPTS, max_new_tokens=12)
    assert together == [model.generate([prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == [naive(model, prompt, 12) for prompt in PROMPTS]
    assert len({token for text in together for token in text}) > 6  # not one constant answer


@settings(deadline=None, max_examples=15, derandomize=True)
@given(lengths=st.lists(st.integers(1, 17), min_size=1, max_size=5), piece=st.integers(1, 20), seed=st.integers(0, 99))
def test_prefill_in_pieces_changes_nothing(
    make_model: Callable[..., CausalLM], random_ids: Callable[..., Tensor], lengths: list[int], piece: int, seed: int
) -> None:
    model = make_model("rat", "sliding_window", "attention", "rnn")
    prompts = [random_ids(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]
    expected = model.generate(prompts, max_new_tokens=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PREFILL_TOKENS", piece)
        assert model.generate(prompts, max_new_tokens=5) == expected


def test_pieces_of_a_prefill_are_no_longer_than_allowed(rat: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    step = rat.step
    monkeypatch.setattr(rat, "step", lambda ids, *rest: (lengths.append(ids.shape[1]), step(ids, *rest))[1])
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 4)
    rat.generate([list(range(10)), [1]], max_new_tokens=3)
    assert lengths == [4, 4, 2, 1, 1]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32).numpy()])
def test_prompts_may_be_any_sequence_of_ids(rat: CausalLM, kind: Callable[[list[int]], Any]) -> None:
    expected = rat.generate(PROMPTS, max_new_tokens=3)
    assert rat.generate([kind(prompt) for prompt in PROMPTS], max_new_tokens=3) == expected


def test_so_many_tokens_are_made_as_asked_for(rat: CausalLM) -> None:
    texts = rat.generate(PROMPTS, max_new_tokens=7)
    for count in (0, 1, 2):
        assert rat.generate(PROMPTS, max_new_tokens=count) == [text[:count] for text in texts]
    assert rat.generate([], max_new_tokens=3) == []
    assert list(rat.stream(PROMPTS, max_new_tokens=0)) == []


def test_a_row_that_ends_stops_alone(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_new_tokens": 12, "repetition_penalty": 1.2}
    free = model.generate(PROMPTS, **options)
    # A token that some rows draw, at different times, and others never.
    first = {token: [text.index(token) for text in free if token in text] for token in range(V)}
    eos = next(t for t, at in first.items() if len(set(at)) > 1 and len(at) < len(free))
    expected = [text[: text.index(eos) + 1] if eos in text else text for text in free]
    rows: list[int] = []
    step = model.step
    monkeypatch.setattr(model, "step", lambda ids, *rest: (rows.append(len(ids)), step(ids, *rest))[1])
    assert model.generate(PROMPTS, eos_token_id=eos, **options) == expected
    # Those that ended are decoded no further.
    assert rows[1:] == [sum(len(text) > n for text in expected) for n in range(1, 12)]
    stream = list(model.stream(PROMPTS, eos_token_id=eos, **options))
    assert stream == [[text[n] if n < len(text) else None for text in expected] for n in range(12)]


def test_a_row_is_stopped_by_what_the_caller_sees(rat: CausalLM) -> None:
    free = rat.generate(PROMPTS, max_new_tokens=9)
    made = [0] * len(PROMPTS)

    def stop(row: int, token: int) -> bool:
        assert token == free[row][made[row]]
        made[row] += 1
        return made[row] > row

    assert rat.generate(PROMPTS, max_new_tokens=9, stop=stop) == [text[: row + 1] for row, text in enumerate(free)]
    assert made == [1, 2, 3, 4, 5, 6]


def test_generation_ends_with_its_last_row(rat: CausalLM) -> None:
    text = rat.generate([PROMPTS[1]], max_new_tokens=12)[0]
    eos = text[2]
    stream = list(rat.stream([PROMPTS[1]], max_new_tokens=12, eos_token_id=eos))
    assert [step[0] for step in stream] == text[: text.index(eos) + 1]


def test_a_stream_is_lazy(rat: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    step = rat.step
    monkeypatch.setattr(rat, "step", lambda *inputs: (calls.append(1), step(*inputs))[1])
    texts = rat.generate(PROMPTS, max_new_tokens=4)
    calls.clear()
    stream = rat.stream(PROMPTS, max_new_tokens=4)
    assert not calls
    for n in range(4):
        assert next(stream) == [text[n] for text in texts]
        assert len(calls) == n + 1
    assert next(stream, "the end") == "the end"
    assert len(calls) == 4


def test_two_streams_of_one_model_do_not_meet(rat: CausalLM) -> None:
    expected = [rat.generate([prompt], max_new_tokens=5)[0] for prompt in PROMPTS[:2]]
    streams = [rat.stream([prompt], max_new_tokens=5) for prompt in PROMPTS[:2]]
    found = [[a[0], b[0]] for a, b in zip(*streams, strict=True)]
    assert found == [list(pair) for pair in zip(*expected, strict=True)]


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 0.7, "top_p": 1.0},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.7},
    {"temperature": 1.0, "repetition_penalty": 1.8},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "repetition_penalty": 0.6},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_have_the_distribution_of_the_formula(setting: dict[str, Any]) -> None:
    count, seen = 40_000, {0, 3, 8}
    logits = torch.randn(10, generator=torch.Generator().manual_seed(3)) * 1.5
    expected = torch.tensor(probabilities(logits.tolist(), seen, **setting))
    held = torch.tensor([i in seen for i in range(10)]).expand(count, -1)
    drawn = Sampling(**setting).draw(logits.expand(count, -1), held, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=10) / count
    assert (share[expected == 0] == 0).all()
    assert (share - expected).abs().sum() / 2 < 0.015


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 0.99),
    penalty=st.floats(0.5, 2),
)
def test_no_token_is_drawn_that_was_filtered_out(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, held = torch.randn(3, 10, generator=generator) * 3, torch.rand(3, 10, generator=generator) < 0.4
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    drawn = torch.stack([sampling.draw(logits, held, generator) for _ in range(30)])
    for row in range(3):
        seen = set(held[row].nonzero().flatten().tolist())
        allowed = probabilities(logits[row].tolist(), seen, temperature, top_k, top_p, penalty)
        assert all(allowed[token] > 0 for token in drawn[:, row].tolist())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@torch.no_grad()
def test_sampled_text_follows_the_formula_token_by_token(rat: CausalLM, setting: dict[str, Any]) -> None:
    ids, draw = list(PROMPTS[2]), torch.Generator().manual_seed(11)
    for _ in range(10):
        chances = probabilities(rat(torch.tensor([ids]))[0, -1].tolist(), set(ids), **setting)
        ids.append(int(torch.multinomial(torch.tensor([chances]), 1, generator=draw)))
    generator = torch.Generator().manual_seed(11)
    assert rat.generate([PROMPTS[2]], max_new_tokens=10, generator=generator, **setting) == [ids[len(PROMPTS[2]) :]]


@pytest.mark.parametrize("penalty", [1.5, 0.7, 5.0])
@torch.no_grad()
def test_greedy_decoding_heeds_the_repetition_penalty(model: CausalLM, penalty: float) -> None:
    texts = model.generate(PROMPTS, max_new_tokens=10, repetition_penalty=penalty)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = list(prompt)
        for token in text:
            logits = model(torch.tensor([ids]))[0, -1].tolist()
            chances = probabilities(logits, set(ids), repetition_penalty=penalty)
            assert token == chances.index(max(chances))
            ids.append(token)
    assert texts != model.generate(PROMPTS, max_new_tokens=10)


def test_greedy_is_the_default_and_the_same_as_the_likeliest_alone(rat: CausalLM) -> None:
    greedy = rat.generate(PROMPTS, max_new_tokens=8)
    assert rat.generate(PROMPTS, max_new_tokens=8, temperature=1.0, top_k=1) == greedy
    assert rat.generate(PROMPTS, max_new_tokens=8, temperature=0.0, top_k=7, top_p=0.9) == greedy


def test_seeded_draws_can_be_repeated(rat: CausalLM) -> None:
    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return rat.generate(PROMPTS, max_new_tokens=8, temperature=1.0, generator=generator)

    assert draw(1) == draw(1) != draw(2)
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(rat.generate(PROMPTS, max_new_tokens=8, temperature=1.0))
    assert texts[0] == texts[1]


def test_a_stream_draws_what_generate_draws(rat: CausalLM) -> None:
    options = {"max_new_tokens": 9, "temperature": 1.2, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.3}
    texts = rat.generate(PROMPTS, **options, generator=torch.Generator().manual_seed(5))
    steps = rat.stream(PROMPTS, **options, generator=torch.Generator().manual_seed(5))
    assert [list(text) for text in zip(*steps, strict=True)] == texts


def test_generation_leaves_the_model_as_it_was(rat: CausalLM) -> None:
    before = {name: x.clone() for name, x in rat.state_dict().items()}
    mode = rat.training
    stream = rat.stream(PROMPTS, max_new_tokens=3)
    next(stream)
    # A step of training between two tokens: no inference mode leaks out of the stream.
    rat(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    list(stream)
    assert rat.training == mode
    assert all(torch.equal(x, before[name]) for name, x in rat.state_dict().items())


@pytest.mark.parametrize("autocast", [False, True])
def test_text_can_be_made_in_bf16(model: CausalLM, autocast: bool) -> None:
    low = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        texts = low.generate(PROMPTS, max_new_tokens=6)
    assert [len(text) for text in texts] == [6] * len(PROMPTS)


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, "^prompt 1 must be a sequence of at least one token id"),
        ({"prompts": [1, 2]}, "^prompt 0 must be a sequence of at least one token id"),
        ({"prompts": [[1], [[2]]]}, "^prompt 1 must be a sequence of at least one token id"),
        ({"prompts": ["Once upon"]}, "^prompt 0 must be a sequence of token ids, got 'Once upon'"),
        ({"prompts": [[1.5]]}, "^prompt 0 must hold whole numbers"),
        ({"prompts": [[1], [2, V]]}, "^prompt 1 holds token 40, the vocabulary has 0 to 39"),
        ({"prompts": [[2, -1]]}, "^prompt 0 holds token -1, the vocabulary has 0 to 39"),
        ({"prompts": [[V]], "max_new_tokens": 0}, "^prompt 0 holds token 40"),
        ({"max_new_tokens": -1}, "^max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.1}, "^temperature must be at least 0, got -0.1"),
        ({"temperature": math.nan}, "^temperature must be at least 0, got nan"),
        ({"top_k": 0}, "^top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "^top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "^top_p must be above 0 and at most 1, got 1.1"),
        ({"top_p": math.nan}, "^top_p must be above 0 and at most 1, got nan"),
        ({"repetition_penalty": 0.0}, "^repetition_penalty must be above 0, got 0.0"),
    ],
)
def test_bad_input_is_one_error_before_anything_runs(
    rat: CausalLM, call: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(rat, call)(**{"prompts": [[1]], "max_new_tokens": 3} | options)


def test_the_smallest_temperature_is_greedy() -> None:
    logits, seen = torch.tensor([[1.0, 3.0, 2.0]]), torch.zeros(1, 3, dtype=torch.bool)
    assert Sampling(temperature=1e-300).draw(logits, seen, None).tolist() == [1]
