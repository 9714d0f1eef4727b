"""Prompts in pieces of the batch against the model's own generation, and the rehearsal of their memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rat import CausalLM, ModelConfig
from rat.benchmarks import serving
from rat.benchmarks.serving import Workload, rehearse, serve
from rat.config import MixerName
from rat.layers import LayerState

PATTERNS: list[tuple[MixerName, ...]] = [("rat",), ("attention",), ("sliding_window", "rnn"), ("rat", "attention")]


@pytest.fixture
def workload() -> Callable[..., Workload]:
    """A tiny model of a pattern, seven tokens of prompt, five new ones; fields may differ."""

    def make(*pattern: MixerName, **fields: Any) -> Workload:
        config = ModelConfig(
            vocab_size=40, d_model=16, num_layers=2, num_heads=4, pattern=pattern, chunk_size=4, window_size=3
        )
        values: dict[str, Any] = {"prompt_length": 7, "new_tokens": 5, "dtype": torch.float32, "backend": "portable"}
        return Workload(config=config, device="cpu", **values | fields)

    return make


@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
@pytest.mark.parametrize("piece", [4096, 14, 5])
def test_it_generates_what_the_model_does(
    workload: Callable[..., Workload],
    make_model: Callable[..., CausalLM],
    monkeypatch: pytest.MonkeyPatch,
    pattern: tuple[MixerName, ...],
    piece: int,
) -> None:
    monkeypatch.setattr(serving, "PREFILL_TOKENS", piece)
    model = make_model(*pattern)
    prompts: list[Tensor] = []
    draw = torch.randint

    def watched(*args: Any, **options: Any) -> Tensor:
        prompts.append(draw(*args, **options))
        return prompts[-1]

    monkeypatch.setattr(serving.torch, "randint", watched)
    with torch.inference_mode():
        state = model.new_state(3, 12)
        first = torch.cat(list(serving._prefill(model, state, workload(*pattern), 3)))
        tokens = serving._decode(model, state, first, 5)
    assert len(prompts) == {4096: 1, 14: 2, 5: 3}[piece]
    assert tokens.tolist() == model.generate(list(torch.cat(prompts)), max_new_tokens=5)


@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_serving_and_its_rehearsal_reach_the_same_length_in_the_models_dtype(
    workload: Callable[..., Workload],
    monkeypatch: pytest.MonkeyPatch,
    pattern: tuple[MixerName, ...],
    dtype: torch.dtype,
) -> None:
    states: list[list[LayerState]] = []
    step = CausalLM.step

    def watched(self: CausalLM, ids: Tensor, state: list[LayerState], *rest: Any) -> Tensor:
        out = step(self, ids, state, *rest)
        assert all(p.dtype == dtype for p in self.parameters())
        assert out.isfinite().all()
        states.append(state)
        return out

    monkeypatch.setattr(CausalLM, "step", watched)
    served = serve(workload(*pattern, dtype=dtype), 3)
    assert served is not None
    assert min(served.prefill_seconds, served.decode_seconds) > 0
    real = states[-1]
    assert rehearse(workload(*pattern, dtype=dtype), 3) is not None
    for part, rehearsed in zip(real, states[-1], strict=True):
        assert part.lengths.tolist() == [7 + 4] * 3, "all but the last token went through the model"
        assert rehearsed.lengths.tolist() == [7 + 5] * 3
        assert {n: x.shape for n, x in part.tensors.items()} == {n: x.shape for n, x in rehearsed.tensors.items()}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("function", [serve, rehearse])
def test_no_memory_is_an_answer_and_a_bug_is_not(
    workload: Callable[..., Workload], monkeypatch: pytest.MonkeyPatch, function: Callable[..., object]
) -> None:
    errors: list[Exception] = [torch.OutOfMemoryError("full"), RuntimeError("a bug")]

    def broken(*_: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(CausalLM, "new_state", broken)
    assert function(workload("rat"), 1) is None
    with pytest.raises(RuntimeError, match="a bug"):
        function(workload("rat"), 1)
