"""The layer benchmark on tiny layers: its table, its arithmetic, both directions of the step."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch

from rat.benchmarks import layer
from rat.config import MixerName
from rat.layers import Mixer

SMALL = {"d_model": 16, "d_head": 4, "chunk_size": 4, "repeats": 2}


@pytest.fixture(autouse=True)
def _known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate runs once and takes as many seconds as its place says."""

    def interleaved(candidates: dict[str, Callable[[], object]], *_: object) -> dict[str, float]:
        for run in candidates.values():
            run()
        return {name: place for place, name in enumerate(candidates, 1)}

    monkeypatch.setattr(layer, "interleaved", interleaved)
    monkeypatch.setattr(layer, "gemm_rate", lambda dtype, device: 1000.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_has_a_row_for_every_length_and_layer(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = get_args(MixerName)
    table = layer.layer_benchmark(seq_lens=[8, 20], mixers=names, dtype=dtype, batch_size=2, **SMALL)
    assert [(row.seq_len, row.mixer) for row in table] == [(length, name) for length in (8, 20) for name in names]
    for place, row in enumerate(table):
        assert row.milliseconds == 1000 * (place % 4 + 1)
        assert row.speedup == 1 / (place % 4 + 1)
    # forward and twice that backward, two rows of eight tokens, a thousand operations a second
    attention = next(row for row in table if row.mixer == "attention")
    assert attention.floor_milliseconds == 3 * (8 * 16**2 + 2 * 8 * 16) * 2 * 8
    printed = capsys.readouterr().out
    assert f"{dtype}, D 16, d 4, L 4, batch 2" in printed
    assert all(printed.count(f"{name} ") == 2 for name in names)


def test_a_step_goes_forward_and_backward_and_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[Mixer, torch.Tensor]] = []
    run = layer._train_step

    def watched(mixer: Mixer, x: torch.Tensor) -> None:
        found: list[torch.Tensor] = []
        hooks = [p.register_hook(found.append) for p in (*mixer.parameters(), x)]
        run(mixer, x)
        for hook in hooks:
            hook.remove()
        assert len(found) == len(hooks)
        steps.append((mixer, x))

    monkeypatch.setattr(layer, "_train_step", watched)
    layer.layer_benchmark(seq_lens=[8], mixers=["rat", "rnn"], **SMALL)
    assert len(steps) == 2
    for mixer, x in steps:
        assert x.grad is None
        assert all(p.grad is None for p in mixer.parameters())
