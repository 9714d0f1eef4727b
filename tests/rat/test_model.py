"""The whole model: decoding, packed documents, the loss, what it refuses."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from rat import CausalLM, ModelConfig
from rat.layers import LayerState

PATTERNS = [("rat",), ("rat", "sliding_window"), ("attention", "sliding_window"), ("rnn", "rat", "attention")]
BORDERS = [
    {"chunk_size": 4, "window_size": 3},
    {"chunk_size": 1, "window_size": 1},
    {"chunk_size": 64, "window_size": 64},
    {"chunk_size": 4, "window_size": 3, "rope_base": None},
]


@pytest.fixture(scope="module", params=BORDERS, ids=str)
def borders(request: pytest.FixtureRequest) -> dict[str, int | None]:
    return request.param


@pytest.fixture(scope="module", params=PATTERNS, ids="-".join)
def model(request: pytest.FixtureRequest, make_model: Callable[..., CausalLM], borders: dict[str, int]) -> CausalLM:
    return make_model(*request.param, **borders)


@torch.no_grad()
def test_steps_of_one_token_and_of_many_equal_the_full_pass(
    model: CausalLM, random_ids: Callable[..., Tensor], assert_close: Callable
) -> None:
    ids = random_ids(2, 14)
    expected = model(ids)
    for cuts in ([14], [1] * 14, [4, 4, 4, 2], [3, 1, 9, 1]):
        state, end = model.new_state(2, 14), 0
        for piece in ids.split(cuts, dim=1):
            end += piece.shape[1]
            assert_close(model.step(piece, state), expected[:, end - 1])
        assert [part.lengths.tolist() for part in state] == [[14, 14]] * len(model.layers)


@torch.no_grad()
def test_scores_of_chosen_positions_are_those_of_the_full_pass(
    model: CausalLM, random_ids: Callable[..., Tensor], assert_close: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rat.model.SCORED_LOGITS", 3 * 40)  # three positions at a time
    ids, targets = random_ids(3, 14), random_ids(3, 14, seed=1)
    full = model(ids).log_softmax(-1)
    targets[0] = full[0].argmax(-1)
    targets[:, ::3] = -100
    asked = targets != -100
    expected = full.gather(2, targets.clamp(min=0)[..., None]).squeeze(-1).masked_fill(~asked, 0)
    state = model.new_state(3, 14)
    pieces = zip(ids.split([5, 1, 8], dim=1), targets.split([5, 1, 8], dim=1), strict=True)
    scores = [model.score(piece, target, state) for piece, target in pieces]
    assert_close(torch.cat([likelihood for likelihood, _ in scores], dim=1), expected)
    assert torch.equal(torch.cat([hit for _, hit in scores], dim=1), (full.argmax(-1) == targets) | ~asked)
    nothing = model.score(ids, torch.full_like(ids, -100), model.new_state(3))
    assert not nothing[0].any()
    assert nothing[1].all()
    with pytest.raises(ValueError, match=r"targets \(3, 2\) do not fit input_ids \(3, 14\)"):
        model.score(ids, targets[:, :2], state)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(pieces=st.lists(st.tuples(*[st.integers(1, 7)] * 3), min_size=1, max_size=4), seed=st.integers(0, 999))
@torch.no_grad()
def test_rows_of_different_lengths_decode_as_if_alone(
    model: CausalLM,
    random_ids: Callable[..., Tensor],
    assert_close: Callable,
    pieces: list[tuple[int, ...]],
    seed: int,
) -> None:
    totals = torch.tensor(pieces).sum(0).tolist()
    rows = [random_ids(n, seed=seed + i) for i, n in enumerate(totals)]
    expected = [model(row[None])[0] for row in rows]
    state, done = model.new_state(3), [0, 0, 0]
    for own in pieces:
        padded = torch.full((3, max(own)), 39)
        for i, n in enumerate(own):
            padded[i, :n] = rows[i][done[i] : done[i] + n]
            done[i] += n
        logits = model.step(padded, state, torch.tensor(own))
        for i, end in enumerate(done):
            assert_close(logits[i], expected[i][end - 1])
    assert state[-1].lengths.tolist() == totals


@torch.no_grad()
def test_a_state_can_be_saved_forked_and_moved_between_steps(
    model: CausalLM, random_ids: Callable[..., Tensor], assert_close: Callable
) -> None:
    ids, more = random_ids(3, 9), random_ids(3, 4, seed=1)
    lengths = torch.tensor([9, 4, 6])
    state = model.new_state(3)
    model.step(ids, state, lengths)
    rows = torch.tensor([2, 0, 2])
    for copy in (
        [part.select(rows) for part in state],
        [LayerState.from_state_dict(part.state_dict()).select(rows).to("cpu") for part in state],
    ):
        logits = model.step(more, copy)
        for i, row in enumerate(rows.tolist()):
            whole = torch.cat([ids[row, : lengths[row]], more[i]])[None]
            assert_close(logits[i], model(whole)[0, -1])


def test_packed_documents_equal_separate_ones_to_the_last_gradient(
    model: CausalLM, random_ids: Callable[..., Tensor], assert_close: Callable
) -> None:
    lengths = (5, 1, 8, 4)
    documents = [random_ids(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], dim=1)
    labels = [random_ids(1, n, seed=50 + n) for n in lengths]
    labels[2][0, 3] = -100
    alone = [model(x) for x in documents]
    assert_close(model(torch.cat(documents, dim=1), document_ids=ids), torch.cat(alone, dim=1))
    losses = [
        F.cross_entropy(x[0], y[0], ignore_index=-100, reduction="sum") for x, y in zip(alone, labels, strict=True)
    ]
    expected = torch.stack(losses).sum() / 17
    loss = model(torch.cat(documents, dim=1), torch.cat(labels, dim=1), ids)
    assert_close(loss, expected)
    parameters = dict(model.named_parameters())
    found, wanted = (torch.autograd.grad(x, list(parameters.values())) for x in (loss, expected))
    for name, gradient, target in zip(parameters, found, wanted, strict=True):
        assert_close(gradient, target, what=name)


def test_the_loss_is_the_cross_entropy_of_the_logits(
    make_model: Callable[..., CausalLM], random_ids: Callable[..., Tensor], assert_close: Callable
) -> None:
    model = make_model("rat", "sliding_window")
    ids, labels = random_ids(3, 11), random_ids(3, 11, seed=1)
    labels[0], labels[1, 4:7] = -100, -100  # a row that counts nothing, and part of another
    loss = model(ids, labels)
    expected = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert loss.shape == ()
    assert_close(loss, expected)
    parameters = dict(model.named_parameters())
    found, wanted = (torch.autograd.grad(x, list(parameters.values())) for x in (loss, expected))
    for name, gradient, target in zip(parameters, found, wanted, strict=True):
        assert_close(gradient, target, what=name)


def test_a_batch_without_targets_costs_nothing(
    make_model: Callable[..., CausalLM], random_ids: Callable[..., Tensor]
) -> None:
    model = make_model("rat", "rnn")
    loss = model(random_ids(2, 5), torch.full((2, 5), -100))
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def most_memory(run: Callable[[], object]) -> int:
    """Bytes that `run` held at once on the CPU, inside of custom operations too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    changes = [e.nbytes() for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most


def test_the_loss_never_stores_the_logits_whole() -> None:
    model = CausalLM(ModelConfig(vocab_size=4000, d_model=16, num_layers=1, num_heads=2, pattern=["rnn"]))
    ids = torch.randint(4000, (2, 512))
    logits = ids.numel() * 4000 * 4
    assert most_memory(lambda: model(ids)) > logits  # the measurement sees what is there
    assert most_memory(lambda: model(ids, ids).backward()) < logits / 2


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_stays_close_to_fp32(
    make_model: Callable[..., CausalLM], random_ids: Callable[..., Tensor], assert_close: Callable, how: str
) -> None:
    ids = random_ids(2, 16)
    expected = make_model("rat", "attention")(ids, ids)
    model = make_model("rat", "attention")
    if how == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = model(ids, ids)
    loss.backward()
    assert_close(loss, expected, 0.03)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_head_is_the_embedding(make_model: Callable[..., CausalLM]) -> None:
    model = make_model("rat")
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if not name.startswith("layers.")] == ["embedding.weight", "norm.weight"]
    model(torch.tensor([[1]]), torch.tensor([[3]])).backward()
    # Rows of tokens that were never an input get their gradient through the head.
    assert bool((model.embedding.weight.grad.abs().sum(-1) > 0).all())


def test_any_length_goes_through_a_model(
    make_model: Callable[..., CausalLM], random_ids: Callable[..., Tensor]
) -> None:
    model = make_model("rat", "sliding_window", max_seq_len=4)
    for length in (1, 3, 4, 5, 30):
        assert model(random_ids(1, length)).shape == (1, length, 40)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.zeros(3, dtype=torch.long)], r"input_ids must be \(B, T\) with B, T >= 1, got \(3,\)"),
        ([torch.zeros(2, 0, dtype=torch.long)], r"input_ids must be \(B, T\) with B, T >= 1, got \(2, 0\)"),
        ([torch.zeros(0, 2, dtype=torch.long)], r"input_ids must be .*got \(0, 2\)"),
        (
            [torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)],
            r"labels \(2, 2\) do not fit input_ids \(2, 3\)",
        ),
        ([torch.zeros(2, 3, dtype=torch.long), None, torch.zeros(2, 2, dtype=torch.long)], "document_ids must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    make_model: Callable[..., CausalLM], inputs: list[Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model("rat", "attention")(*inputs)


def test_an_empty_step_is_refused(make_model: Callable[..., CausalLM]) -> None:
    model = make_model("rat")
    with pytest.raises(ValueError, match="input_ids must be"):
        model.step(torch.zeros(1, 0, dtype=torch.long), model.new_state(1))


def test_a_state_of_other_rows_is_refused(
    make_model: Callable[..., CausalLM], random_ids: Callable[..., Tensor]
) -> None:
    model = make_model("rat")
    with pytest.raises(ValueError, match=r"the state has 2 rows, input_ids are \(1, 3\)$"):
        model.step(random_ids(1, 3), model.new_state(2))
    with pytest.raises(ValueError, match=r"the state has 2 rows, input_ids are \(2, 3\), lengths \(3,\)"):
        model.step(random_ids(2, 3), model.new_state(2), torch.tensor([1, 2, 3]))
