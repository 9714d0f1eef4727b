"""The protocol of a mixer, held by every name that a pattern may contain."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rat.config import MixerName
from rat.layers import RAT, RNN, Attention, GatedMixer, Mixer
from rat.model import MIXERS

D, ROWS = 16, 3
RECURRENT = {"rat": ("value", "key"), "rnn": ("value",)}

# For each call of `step`, how many tokens of their own the rows bring; it may be none.
PIECES = st.lists(
    st.lists(st.integers(0, 6), min_size=ROWS, max_size=ROWS).filter(any), min_size=1, max_size=5
)  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_by(mixer: Mixer, x: Tensor, *pieces: int) -> Tensor:
    """The outputs of steps of the given lengths, joined."""
    state = mixer.new_state(len(x), x.shape[1])
    return torch.cat([mixer.step(piece, state) for piece in x.split(pieces, dim=1)], dim=1)


@torch.no_grad()
def test_token_by_token_and_one_prefill_equal_the_full_pass(mixer: Mixer, assert_close: Callable) -> None:
    x = random(2, 13, D)
    expected = mixer(x)
    assert_close(step_by(mixer, x, 13), expected)
    assert_close(step_by(mixer, x, *[1] * 13), expected)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(pieces=PIECES)
@torch.no_grad()
def test_ragged_pieces_equal_the_full_pass_of_each_row(
    mixer: Mixer, assert_close: Callable, pieces: list[list[int]]
) -> None:
    totals = torch.tensor(pieces).sum(0)
    rows = [random(1, n, D, seed=i) for i, n in enumerate(totals.tolist())]
    state, found = mixer.new_state(ROWS), [[] for _ in rows]
    done = [0] * ROWS
    for own in pieces:
        # Padding that would show if anything read it.
        x = random(ROWS, max(own), D, seed=99) * 50
        for i, n in enumerate(own):
            x[i, :n] = rows[i][0, done[i] : done[i] + n]
        out = mixer.step(x, state, torch.tensor(own))
        for i, n in enumerate(own):
            found[i].append(out[i : i + 1, :n])
            done[i] += n
    assert state.lengths.tolist() == totals.tolist()
    for row, out in zip(rows, found, strict=True):
        if row.shape[1]:
            assert_close(torch.cat(out, dim=1), mixer(row))


@torch.no_grad()
def test_padding_leaves_no_trace_in_what_comes_after(mixer: Mixer) -> None:
    x, after = random(2, 7, D), random(2, 5, D, seed=1)
    lengths, outputs = torch.tensor([7, 2]), []
    for noise in (0.0, 50.0):
        padded = x.clone()
        padded[1, 2:] = noise
        state = mixer.new_state(2)
        mixer.step(padded, state, lengths)
        outputs.append(mixer.step(after, state))
    assert torch.equal(*outputs)


def test_packed_documents_equal_separate_ones_forward_and_backward(mixer: Mixer, assert_close: Callable) -> None:
    # Lengths on both sides of chunks and windows; ids are no ranks, and come again in a row.
    pieces = [random(1, n, D, seed=n) for n in (5, 1, 8, 3)]
    ids = torch.tensor([3] * 5 + [0] + [7] * 8 + [3] * 3)[None]
    weight = random(1, 17, D, seed=50)
    results = []
    for packed in (True, False):
        parts = [x.clone().requires_grad_() for x in pieces]
        out = mixer(torch.cat(parts, 1), ids) if packed else torch.cat([mixer(x) for x in parts], 1)
        inputs = [*parts, *mixer.parameters()]
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@torch.no_grad()
def test_no_output_depends_on_later_tokens(mixer: Mixer) -> None:
    x = random(1, 12, D)
    changed = x.clone()
    changed[:, 7:] = random(1, 5, D, seed=1)
    difference = (mixer(x) - mixer(changed)).abs().amax(-1)[0]
    assert difference[:7].max() < 1e-6
    assert difference[7:].min() > 1e-3


@pytest.mark.parametrize(("setting", "window"), [("small", 3), ("ones", 1)])
@torch.no_grad()
def test_a_window_holds_the_token_and_as_many_before_it(make_mixer: Callable, setting: str, window: int) -> None:
    mixer, x = make_mixer("sliding_window", setting), random(1, 10, D)
    for first in (0, 4):
        changed = x.clone()
        changed[:, first] += 1
        differs = (mixer(x) - mixer(changed)).abs().amax(-1)[0] > 1e-5
        assert differs.nonzero().flatten().tolist() == list(range(first, min(10, first + window + 1)))


@torch.no_grad()
def test_a_state_grows_beyond_its_room(mixer: Mixer) -> None:
    x = random(2, 11, D)
    outputs = []
    for room in (0, 1, 5, 11):
        state = mixer.new_state(2, room)
        outputs.append(torch.cat([mixer.step(piece, state) for piece in x.split([1, 4, 1, 5], dim=1)], dim=1))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


@pytest.mark.parametrize("pieces", [[1] * 12, [12], [5, 1, 6]])
@torch.no_grad()
def test_a_state_takes_the_memory_that_the_cost_model_says(mixer: Mixer, pieces: list[int]) -> None:
    state = mixer.new_state(2, 12)
    assert state.num_bytes() == 2 * 4 * mixer.cache_elements(12)
    for piece in random(2, 12, D).split(pieces, dim=1):
        mixer.step(piece, state)
    assert state.num_bytes() == 2 * 4 * mixer.cache_elements(12)


@torch.no_grad()
def test_rows_can_be_dropped_forked_and_reordered(mixer: Mixer, assert_close: Callable) -> None:
    x, more = random(3, 6, D), random(3, 5, D, seed=1)
    state = mixer.new_state(3)
    mixer.step(x, state, torch.tensor([6, 2, 5]))
    rows = torch.tensor([2, 0, 2])
    fork = state.select(rows)
    forked = torch.cat([mixer.step(piece, fork) for piece in more.split(1, dim=1)], dim=1)
    for i, row in enumerate(rows.tolist()):
        whole = torch.cat([x[row, : [6, 2, 5][row]], more[i]])[None]
        assert_close(forked[i : i + 1], mixer(whole)[:, -5:])
    # The original goes on as if there had been no fork.
    assert state.lengths.tolist() == [6, 2, 5]
    assert_close(mixer.step(more, state)[1:2], mixer(torch.cat([x[1, :2], more[1]])[None])[:, -5:])


@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_the_recurrent_state_is_fp32_under_bf16(make_mixer: Callable, name: MixerName, how: str) -> None:
    mixer, x = make_mixer(name), random(1, 9, D)
    if how == "weights":
        mixer, x = mixer.bfloat16(), x.bfloat16()
    recurrent = RECURRENT.get(name, ())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        state = mixer.new_state(1)
        expected = {n: torch.float32 if n in recurrent else torch.bfloat16 for n in state.tensors}
        for piece in x.split([1, 5, 1, 1, 1], dim=1):
            assert {n: y.dtype for n, y in state.tensors.items()} == expected
            assert mixer.step(piece, state).dtype == torch.bfloat16
    assert {n: y.dtype for n, y in state.tensors.items()} == expected
    # Not only stored so: what it holds needs more than bf16.
    for n in recurrent:
        assert not torch.equal(state.tensors[n], state.tensors[n].bfloat16().float())


@pytest.mark.parametrize("made_under_autocast", [True, False])
@torch.no_grad()
def test_a_state_may_meet_another_precision(
    make_mixer: Callable, name: MixerName, made_under_autocast: bool, assert_close: Callable
) -> None:
    mixer, x = make_mixer(name), random(1, 9, D)
    with torch.autocast("cpu", torch.bfloat16, enabled=made_under_autocast):
        state = mixer.new_state(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=not made_under_autocast):
        steps = [mixer.step(piece, state).float() for piece in x.split([3, 1, 5], dim=1)]
    assert_close(torch.cat(steps, dim=1), mixer(x), 0.05)


@pytest.mark.parametrize(("name", "setting"), [("rnn", "small"), ("rat", "long")])
@torch.no_grad()
def test_long_memories_do_not_stall_under_bf16(
    make_mixer: Callable, assert_close: Callable, name: MixerName, setting: str
) -> None:
    mixer, x = make_mixer(name, setting), random(1, 60, D) + 1
    mixer.gate_bias.fill_(8.0)  # remembers thousands of tokens: a step is below the resolution of bf16
    low = make_mixer(name, setting).bfloat16()
    low.gate_bias.fill_(8.0)
    state, expected = low.new_state(1), mixer.new_state(1)
    for token in x.split(1, dim=1):
        low.step(token.bfloat16(), state)
        mixer.step(token, expected)
    assert_close(state.tensors["value"], expected.tensors["value"], 2e-2)


# Written out for D = 16, L = 4, G = 2 heads of 4, W = 3 and rows of t tokens.
FLOPS: dict[MixerName, Callable[[int], float]] = {
    "rat": lambda t: 2 * (4 * D + 2 * 2 * 4) * D + 2 * (t / 4) * D,
    "attention": lambda t: 8 * D**2 + 2 * t * D,
    "sliding_window": lambda t: 8 * D**2 + 4 * 3 * D,
    "rnn": lambda t: 8 * D**2,
}
ELEMENTS: dict[MixerName, Callable[[int], int]] = {
    "rat": lambda t: 2 * math.ceil(t / 4) * D + 2 * D,
    "attention": lambda t: 2 * t * D,
    "sliding_window": lambda t: 2 * (3 + 1) * D,
    "rnn": lambda t: D,
}


def test_costs_follow_the_formulas(make_mixer: Callable, name: MixerName) -> None:
    mixer = make_mixer(name)
    for length in (8, 64, 400):
        assert mixer.flops_per_token(length) == FLOPS[name](length)
    for length in (1, 4, 13, 400):
        assert mixer.cache_elements(length) == ELEMENTS[name](length)


def test_a_window_beyond_the_row_costs_no_more_than_attention(make_mixer: Callable) -> None:
    window, whole = make_mixer("sliding_window", "long"), make_mixer("attention")
    assert window.flops_per_token(50) == whole.flops_per_token(50)
    assert window.flops_per_token(500) < whole.flops_per_token(500)


def test_every_name_has_its_mixer(name: MixerName) -> None:
    assert MIXERS.keys() == FLOPS.keys()
    assert name in MIXERS


@pytest.mark.parametrize("name", ["rat", "rnn"])
@torch.no_grad()
def test_watched_gates_tell_how_far_they_remember(make_mixer: Callable, name: MixerName) -> None:
    mixer: GatedMixer = make_mixer(name)
    x = random(2, 5, D)
    with pytest.raises(RuntimeError, match="no gates were watched"):
        mixer.memory_length()
    mixer.watched = True
    mixer(x)
    gate = torch.sigmoid(mixer.in_proj(x)[..., 2 * D : 3 * D].double() + mixer.gate_bias)
    torch.testing.assert_close(mixer.memory_length().double(), 1 / (1 - gate), rtol=1e-4, atol=0)
    mixer.watched = False
    mixer(x)
    with pytest.raises(RuntimeError, match="no gates were watched"):
        mixer.memory_length()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RNN(10, 3, 8), "d_model 10 is not divisible by num_heads 3"),
        (lambda: Attention(10, 4, None), "d_model 10 is not divisible by num_heads 4"),
        (lambda: RAT(12, 3, 4, 2, None), "num_heads 3 is not divisible by num_groups 2"),
    ],
)
def test_impossible_widths_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("document_ids", [None, [[0] * 5 + [1] * 8, [0] * 13]], ids=["one text", "documents"])
def test_one_chunk_computes_what_the_rnn_does(
    make_mixer: Callable[..., Mixer], assert_close: Callable, document_ids: list[list[int]] | None
) -> None:
    """Forward and backward, which docs/results.md reads its control by."""
    rat, rnn = make_mixer("rat", "long"), make_mixer("rnn", "long")
    shared = len(rnn.in_proj.weight)
    with torch.no_grad():
        rnn.in_proj.weight.copy_(rat.in_proj.weight[:shared])
        rnn.out_proj.weight.copy_(rat.out_proj.weight)
        rnn.gate_bias.copy_(rat.gate_bias)
    x, documents = random(2, 13, D), None if document_ids is None else torch.tensor(document_ids)
    outputs = [mixer(x, documents) for mixer in (rat, rnn)]
    assert_close(*outputs)
    for output in outputs:
        output.backward(random(2, 13, D, seed=1))
    ours = rat.in_proj.weight.grad
    assert_close(ours[:shared], rnn.in_proj.weight.grad)
    assert torch.all(ours[shared:].abs() < 1e-6), "queries and keys decide nothing"
    assert_close(rat.out_proj.weight.grad, rnn.out_proj.weight.grad)
    assert_close(rat.gate_bias.grad, rnn.gate_bias.grad)
