"""The layer benchmark on tiny layers: its table, its arithmetic, every mode, every contender, what it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import matplotlib.image
import pytest
import torch
from torch.utils.benchmark import Measurement, TaskSpec

from rat.benchmarks import contenders, layer
from rat.benchmarks.contenders import Contender, make_layer
from rat.benchmarks.floors import Mode
from rat.benchmarks.steps import make_step
from rat.layers import LayerState, Mixer
from rat.ops import get_backend

SMALL: dict[str, Any] = {"d_model": 16, "d_head": 4, "chunk_size": 4, "window_size": 5, "repeats": 2}
ALL = get_args(Contender)


@pytest.fixture
def bench(tmp_path: Path, known_times: None) -> Callable[..., list[layer.LayerTiming]]:
    """The benchmark with known times, in this folder."""
    return lambda **options: layer.layer_benchmark(output=tmp_path, **SMALL | options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_and_contender_has_its_cell(
    bench: Callable[..., list[layer.LayerTiming]], dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = bench(seq_lens=[8, 18], mixers=ALL, dtype=dtype, batch_size=2)
    modes: tuple[Mode, ...] = get_args(Mode)
    cells = [(cell.mode, cell.seq_len, cell.contender) for cell in table]
    assert cells == [(mode, length, name) for mode in modes for length in (8, 18) for name in ALL]
    for cell in table:
        if cell.mode == "decode" and cell.contender in ("rat_masked", "rat_sdpa"):
            assert cell.milliseconds is None
            assert "nothing to mask" in (cell.skipped or "")
            continue
        rank = ALL.index(cell.contender) + 1
        assert (cell.milliseconds, cell.iqr_milliseconds, cell.speedup) == (1000 * rank, 1000 * rank, 1 / rank)
        assert cell.times_floor == pytest.approx(cell.milliseconds / cell.floor_milliseconds)
        assert cell.seconds == [rank * x for x in (0.5, 0.75, 1, 1.75, 2)]
        assert (cell.kept_bytes is not None) == (cell.mode == "train")
    printed = capsys.readouterr().out
    assert f"{dtype}, D 16, d 4, L 4, G 2, W 5, batch 2" in printed
    assert "kernel backend auto" in printed
    assert printed.count("  rat_sdpa ") == 6 + 1, "three modes at two lengths, and the growth"
    written = json.loads((tmp_path / "layer.json").read_text())
    assert [row["contender"] for row in written["rows"]] == [cell.contender for cell in table]
    assert written["complete"] is True
    assert written["rates"] == {
        "flops_per_second": 1000.0, "bytes_per_second": 500.0, "fp32_flops_per_second": 0.0,
    }  # fmt: skip
    assert written["options"]["seq_lens"] == [8, 18]
    assert written["machine"]["torch"] == torch.__version__
    assert matplotlib.image.imread(tmp_path / "layer.png").std() > 0.05


def test_the_floor_is_the_cost_models(bench: Callable[..., list[layer.LayerTiming]]) -> None:
    (cell,) = bench(seq_lens=[8], mixers=["attention"], modes=["train"], batch_size=2)
    # forward and twice that backward, two rows of eight tokens, a thousand operations a second
    assert cell.floor_milliseconds == 3 * (8 * 16**2 + 2 * 8 * 16) * 2 * 8
    assert cell.floor_limit == "arithmetic"


def test_growth_compares_the_time_of_a_token(
    bench: Callable[..., list[layer.LayerTiming]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def three_times_as_long(candidates: dict[str, object], _: int, device: torch.device, label: str) -> Any:
        seconds = {"train, T 8": 1.0, "train, T 16": 6.0}[label]
        return {name: Measurement(1, [seconds], TaskSpec(name, "")) for name in candidates}

    monkeypatch.setattr(layer, "interleaved", three_times_as_long)
    bench(seq_lens=[16, 8], mixers=["attention"], modes=["train"])
    (grown,) = json.loads((tmp_path / "layer.json").read_text())["growth"]
    predicted = (8 * 16**2 + 2 * 16 * 16) / (8 * 16**2 + 2 * 8 * 16)
    assert grown == {"contender": "attention", "seq_len": 16, "measured": 3.0, "predicted": predicted}


@pytest.mark.parametrize("name", ["rat", "attention", "sliding_window", "rnn"])
def test_each_decoding_step_starts_at_the_same_position(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = make_mixer(name)
    seen: list[LayerState] = []
    run = type(mixer).step

    def watched(self: Mixer, x: torch.Tensor, state: LayerState, lengths: torch.Tensor | None = None) -> torch.Tensor:
        assert state.lengths.tolist() == [9, 9]
        assert state.longest == 9
        assert all(tensor.count_nonzero() for tensor in state.tensors.values())
        seen.append(state)
        return run(self, x, state, lengths)

    monkeypatch.setattr(type(mixer), "step", watched)
    step = make_step(mixer, "decode", 2, 9)
    outputs = [step(), step(), step()]
    assert all(out.isfinite().all() for out in outputs)
    assert [state.longest for state in seen] == [10, 10, 10]


def test_prefill_fills_an_empty_state(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = make_mixer("rat")
    before: list[int] = []
    run = type(mixer).step

    def watched(self: Mixer, x: torch.Tensor, state: LayerState) -> torch.Tensor:
        before.append(state.longest)
        out = run(self, x, state)
        assert state.longest == x.shape[1] == 9
        return out

    monkeypatch.setattr(type(mixer), "step", watched)
    step = make_step(mixer, "prefill", 2, 9)
    step()
    step()
    assert before == [0, 0]


def test_a_train_step_goes_forward_and_backward_and_leaves_no_gradient() -> None:
    mixer = make_mixer("rat")
    x_grad, *grads = make_step(mixer, "train", 2, 9)()  # type: ignore[misc]
    assert x_grad.shape == (2, 9, 16)
    assert all(grad.shape == p.shape and grad.any() for grad, p in zip(grads, mixer.parameters(), strict=True))
    assert all(p.grad is None for p in mixer.parameters())


def test_attention_always_is_pytorchs_and_the_others_follow_the_option(
    bench: Callable[..., list[layer.LayerTiming]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    for name in ("rat", "attention"):
        kind = type(make_mixer(name))

        def watched(self: Mixer, *inputs: Any, name: str = name, run: Any = kind.forward) -> torch.Tensor:
            seen.setdefault(name, set()).add(get_backend())
            return run(self, *inputs)

        monkeypatch.setattr(kind, "forward", watched)
    bench(seq_lens=[8], mixers=["attention", "rat"], modes=["train"], backend="reference")
    assert seen == {"attention": {"portable"}, "rat": {"reference"}}
    assert get_backend() == "auto"


def test_what_memory_does_not_suffice_for_is_skipped_and_said(
    bench: Callable[..., list[layer.LayerTiming]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contenders, "available_bytes", lambda device: 10_000)
    kind = type(make_mixer("attention"))

    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(kind, "forward", full)
    table = bench(seq_lens=[8, 64], mixers=["attention", "rat", "rat_masked"], modes=["train"])
    assert [cell.skipped for cell in table[:3]] == ["out of memory", None, None]
    assert table[1].speedup is None, "there is no yardstick"
    assert table[5].skipped == "its mask and scores would take about 0.0 GB, 0.0 GB are free"
    assert "skipped: out of memory" in capsys.readouterr().out


def test_other_errors_are_not_hidden(
    bench: Callable[..., list[layer.LayerTiming]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(type(make_mixer("rat")), "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        bench(seq_lens=[8], mixers=["rat"], modes=["train"])


def test_an_interruption_leaves_the_finished_rows(
    bench: Callable[..., list[layer.LayerTiming]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure = layer.interleaved

    def stopped(steps: Any, repeats: int, device: torch.device, label: str) -> Any:
        if label == "train, T 16":
            raise KeyboardInterrupt
        return measure(steps, repeats, device, label)

    monkeypatch.setattr(layer, "interleaved", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(seq_lens=[8, 16], mixers=["rat", "rnn"], modes=["train"])
    written = json.loads((tmp_path / "layer.json").read_text())
    assert [(row["seq_len"], row["contender"]) for row in written["rows"]] == [(8, "rat"), (8, "rnn")]
    assert written["complete"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer.json", "layer.png"]
    assert f"interrupted; the finished rows are in {tmp_path / 'layer.json'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixers": ["rat", "atention"]}, "unknown mixer 'atention': choose from rat, attention, sliding_window, rnn"),
        ({"mixers": []}, "name at least one mixer"),
        ({"mixers": ["rat", "rat"]}, "each of them once"),
        ({"modes": ["train", "decoding"]}, "unknown mode 'decoding': choose from train, prefill, decode"),
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"seq_lens": [8, 0]}, r"seq_lens must be at least 1, got \[8, 0\]"),
        ({"seq_lens": []}, "seq_lens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"d_head": 5}, "d_model 16 is not divisible by d_head 5"),
        ({"num_groups": 3}, "num_heads 4 is not divisible by num_groups 3"),
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1"),
        ({"device": "tpu"}, "there is no device 'tpu' here"),
        ({"device": "cuda:99"}, "there is no device 'cuda:99' here"),
        ({"backend": "fast"}, "unknown kernel backend 'fast'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    bench: Callable[..., list[layer.LayerTiming]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        bench(**options)
    assert not list(tmp_path.iterdir())


def make_mixer(name: str) -> Mixer:
    config = contenders.layer_config(
        [name],
        d_model=16,
        d_head=4,
        chunk_size=4,
        num_groups=2,
        window_size=5,  # type: ignore[list-item]
    )
    return make_layer(name, config, torch.float32, torch.device("cpu"))
