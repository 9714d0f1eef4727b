"""What the notebooks draw and say is what the records hold."""

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.axes import Axes

from rat import CausalLM, ModelConfig
from rat_cli import figures


@pytest.fixture
def ax() -> Iterator[Axes]:
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def runs() -> pd.DataFrame:
    """Two seeds of RAT with two chunk sizes, and one of two others."""
    rows = [
        ("rat-L16", "rat", 16, 0, 12.0), ("rat-L4", "rat", 4, 0, 10.0), ("rat-L16", "rat", 16, 1, 14.0),
        ("rat-L4", "rat", 4, 1, 10.0), ("rnn", "rnn", 16, 0, 20.0), ("rat-swa", "rat sliding_window", 16, 0, 9.0),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["variant", "pattern", "chunk_size", "seed", "loss"])


def test_variants_of_the_ablations_look_different() -> None:
    names = [
        "attention",
        "rnn",
        "rat",
        "rat-swa",
        "attention-swa",
        "rat-L1",
        "rat-L4",
        "rat-L16",
        "rat-L64",
        "rat-L512",
    ]
    looks = {name: figures.look(name) for name in names}
    seen = {(look["color"], look.get("linestyle"), look["marker"]) for look in looks.values()}
    assert len(seen) == len(names)
    darkness = [-sum(looks[f"rat-L{size}"]["color"][:3]) for size in (1, 4, 16, 64, 512)]
    assert darkness == sorted(darkness)
    without = figures.look("attention-swa-nope")
    assert without["color"] == looks["attention-swa"]["color"]
    assert without["linestyle"] == ":"
    assert figures.look("rat-Large") == figures.look("rat")


def test_perplexity_against_the_chunk_size(ax: Axes) -> None:
    figures.against_chunk_size(ax, runs(), "loss", "loss, nats")
    (points,) = ax.containers
    line, _, (bars,) = points
    assert line.get_xydata().tolist() == [[4, 10], [16, 13]]
    assert np.ptp(bars.get_segments()[1][:, 1]) == pytest.approx(2 * 2**0.5)
    across = {line.get_label(): set(line.get_ydata()) for line in ax.lines if len(set(line.get_ydata())) == 1}
    assert across == {"rnn": {20.0}, "rat-swa": {9.0}}
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["4", "16"]


def test_loss_by_position_is_a_mean_over_seeds(ax: Axes) -> None:
    columns = ["variant", "seed", "first", "last", "loss"]
    rows = [("rnn", 0, 1, 1, 5.0), ("rnn", 0, 2, 8, 3.0), ("rnn", 1, 1, 1, 6.0), ("rnn", 1, 2, 8, 3.0)]
    figures.by_position(ax, pd.DataFrame(rows, columns=columns), trained=[4])
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 5.5], [4, 3]])
    assert "trained at 4" in [text.get_text() for text in ax.texts]
    ax.clear()
    figures.by_position(ax, pd.DataFrame(rows, columns=columns), trained=[4], perplexity=True)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.exp([5.5, 3]))
    assert ax.get_yscale() == "log"
    ax.clear()
    rows = [(name, 1, 8, 3.0, 0.5) for name in ("rat-RoPE", "rat-NoPE")]
    figures.by_position(ax, pd.DataFrame(rows, columns=["variant", "first", "last", "loss", "within"]), trained=[4, 8])
    assert len({line.get_color() for line in ax.lines[:2]}) == len(ax.collections) == 2, "any models, told apart"
    assert [text.get_text() for text in ax.texts] == ["trained at 4", "trained at 8"]


def test_losses_between_positions_weigh_by_positions() -> None:
    rows = [("rnn", 1, 2, 9.0), ("rnn", 3, 3, 1.0), ("rnn", 4, 6, 5.0), ("rat", 3, 6, 2.0), ("rat", 7, 12, 9.0)]
    positions = pd.DataFrame(rows, columns=["variant", "first", "last", "loss"])
    assert figures.loss_between(positions, 2, 6).to_dict() == {"rnn": 4.0, "rat": 2.0}


def test_accuracies_are_the_last_ones_of_each_run(ax: Axes) -> None:
    rows = [
        ("a-s0", 9, "val/accuracy_by_distance/4", 0.5), ("a-s0", 5, "val/accuracy_by_distance/4", 0.1),
        ("a-s0", 9, "val/accuracy_by_distance/1", 1.0), ("a-s1", 9, "val/accuracy_by_distance/4", 0.7),
        ("a-s1", 9, "val/accuracy_by_items/4", 0.2), ("a-s1", 9, "val/accuracy", 0.3),
    ]  # fmt: skip
    curves = pd.DataFrame(rows, columns=["run", "step", "tag", "value"]).assign(
        variant="attention", seed=lambda table: table.run.str[-1].astype(int)
    )
    table = figures.accuracies(curves, "distance")
    found = sorted(table[["seed", "upto", "accuracy"]].itertuples(index=False, name=None))
    assert found == [(0, 1, 1.0), (0, 4, 0.5), (1, 4, 0.7)]
    figures.by_octave(ax, table, "distance", chance=0.1)
    ((line, *_),) = ax.containers
    np.testing.assert_allclose(line.get_xydata(), [[1, 1], [4, 0.6]])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "3–4"]
    ax.clear()
    figures.by_octave(ax, table, "items", chance={1: 1.0, 4: 2 / 7})
    (levels,) = (line for line in ax.lines if line.get_label() == "guessing")
    np.testing.assert_allclose(levels.get_ydata(), [1.0, 2 / 7])


def test_guessing_one_of_the_values(tmp_path: Path) -> None:
    task = {"vocab_size": 18, "num_pairs": 8, "min_pairs": 1, "power_a": 1.0, "noise": False}
    (tmp_path / "rnn-s0").mkdir()
    data = {"seq_len": 64, "val_samples": 512, "task": {"init_args": task}}
    (tmp_path / "rnn-s0" / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": data}}))
    found = figures.guessing(tmp_path, "items")
    # of n pairs one answer is right, and samples of n pairs are alike for every n
    assert found == pytest.approx({1: 1.0, 2: 1 / 2, 4: 2 / 7, 8: 4 / 26}, rel=0.02)
    assert list(figures.guessing(tmp_path, "distance")) == [8, 16, 32, 64], "of few answers nothing is told"
    rows = [(step, f"val/accuracy_by_distance/{upto}", 0.25) for step in (0, 9) for upto in (1, 8, 16)]
    pd.DataFrame(rows, columns=["step", "tag", "value"]).to_csv(tmp_path / "rnn-s0" / "scalars.csv", index=False)
    (tmp_path / "rnn-s0" / "run.json").write_text(json.dumps({"index": 0, "variant": "rnn", "seed": 0}))
    table, chance = figures.recalled(tmp_path, "distance")
    assert sorted(table.upto) == [8, 16]
    assert list(chance) == [8, 16, 32, 64]


def test_when_it_is_learned(ax: Axes) -> None:
    values = {("rnn", 0): (0.1, 0.2), ("rnn", 1): (0.2, 0.9), ("rat", 0): (0.95, 0.8), ("rat", 1): (0.2, 1.0)}
    rows = [
        (v, s, "val/accuracy", step, x)
        for (v, s), pair in values.items()
        for step, x in zip((9, 19), pair, strict=True)
    ]
    curves = pd.DataFrame(rows, columns=["variant", "seed", "tag", "step", "value"])
    assert figures.steps_to(curves, "val/accuracy", 0.9) == "rat 10, 20; rnn 20, never"
    early = [("a", 0, "x", 0, 1.0), ("a", 1, "x", 9, 1.0), ("a", 2, "x", 9, 0.0)]
    steady = [("b", seed, "x", 4, 1.0) for seed in range(3)]
    both = pd.DataFrame(early + steady, columns=curves.columns)
    assert figures.steps_to(both, "x", 0.9) == "b 5, 5, 5; a 1, 10, never", "by their medians"
    figures.while_training(ax, curves, "val/accuracy", "recall")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[9, 0.15], [19, 0.55]])


def test_sizes_are_compared_seed_by_seed() -> None:
    losses = {0: (3.0, 2.0, 2.5, 1.0), 1: (9.0, 8.0, 7.0, 6.0), 2: (1.0, 0.5, 0.6, np.nan)}
    rows = [(seed, 4**i, loss, "rat") for seed, many in losses.items() for i, loss in enumerate(many)]
    runs = pd.DataFrame([*rows, (0, 2, 9.0, "rat sliding_window")], columns=["seed", "chunk_size", "loss", "pattern"])
    runs = runs[runs.loss.notna()].astype({"chunk_size": "Int64"}).assign(variant="rat-L" + runs.chunk_size.astype(str))
    assert figures.from_size_to_size(runs, "loss") == (
        "from 1 to 4 it falls, from 4 to 16 it grows with 2 of 3 seeds, from 16 to 64 it falls"
    )
    assert figures.number_of_seeds(runs) == "1 to 3 seeds"
    assert figures.number_of_seeds(runs[runs.chunk_size == 4]) == "3 seeds"
    assert figures.number_of_seeds(runs[runs.chunk_size == 2]) == "1 seed"


def test_what_is_remembered_is_told_by_the_last_octave() -> None:
    ends = {
        "attention": (1.0, 0.98), "rat-L4": (1.0, 0.97), "rat": (0.9, 0.5), "rat-swa": (0.5, 0.48), "rnn": (0.9, 0.16)
    }  # fmt: skip
    rows = [
        (variant, seed, upto, accuracy + shift)
        for variant, values in ends.items()
        for seed, shift in enumerate((-0.01, 0.01))
        for upto, accuracy in zip((1, 8), values, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["variant", "seed", "upto", "accuracy"])
    assert figures.remembered(table, {1: 1.0, 8: 0.15}) == (
        "it holds in attention 1.00 → 0.98 ± 0.01, rat-L4 1.00 → 0.97 ± 0.01; it degrades in rat 0.90 → 0.50 ± 0.01; "
        "it is level in rat-swa 0.50 → 0.48 ± 0.01; it is guessed in rnn 0.90 → 0.16 ± 0.01"
    )


def test_hybrids_take_the_mean_of_their_layers_times() -> None:
    times = {"attention": 8.0, "rat": 2.0, "sliding_window": 4.0, "rnn": 1.0}
    cells = [
        {"call": size, "mode": mode, "seq_len": 100, "chunk_size": size, "batch_size": 3, "contender": name,
         "milliseconds": time}
        for size in (4, 16) for mode in ("train", "decode") for name, time in times.items()
    ]  # fmt: skip
    speed = figures.layer_speed(pd.DataFrame(cells)).set_index(["mode", "variant", "chunk_size"]).tokens_per_second
    assert speed["train", "rat-L4", 4] == 1000 * 300 / 2
    assert speed["decode", "rnn", 16] == 1000 * 3 / 1
    assert speed["train", "attention-swa", 4] == 1000 * 300 / 6
    assert speed["train", "rat-swa", 16] == 1000 * 300 / 3
    assert ("train", "rat-swa", 4) not in speed.index, "the ablation's hybrid has chunks of 16"


def test_a_slow_round_looks_like_a_quick_one() -> None:
    cells = [
        {"call": turn, "mode": "train", "seq_len": 10, "chunk_size": 4, "batch_size": 1, "contender": name,
         "milliseconds": time * slower}
        for turn, slower in enumerate((3, 1, 2))
        for name, time in {"attention": 8.0, "rat": 2.0, "sliding_window": 4.0, "rnn": 1.0}.items()
    ]  # fmt: skip
    speed = figures.layer_speed(pd.DataFrame(cells))
    assert {*speed[speed.variant == "rat-L4"].tokens_per_second} == {1000 * 10 / (2 * 2)}


def test_means_in_words() -> None:
    means = figures.over_seeds(runs(), ["variant"], "loss")
    assert (
        figures.in_words(means, "variant", digits=1) == "rat-swa 9.0, rat-L4 10.0 ± 0.0, rat-L16 13.0 ± 1.4, rnn 20.0"
    )


@pytest.mark.parametrize("pattern", [["rat"], ["rnn", "attention"]])
def test_what_is_seen_inside_is_what_the_layers_do(pattern: list[str]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=16, d_model=8, num_layers=2, num_heads=2, num_groups=1, pattern=pattern, chunk_size=4, max_seq_len=9
    )  # type: ignore[arg-type]
    model = CausalLM(config).eval()
    inside = figures.look_inside(model, range(9))
    gated = [i for i, name in enumerate(config.layer_names()) if name != "attention"]
    assert list(inside) == gated
    with torch.no_grad():
        first = model.layers[0]
        x = first.mixer_norm(model.embedding(torch.arange(9)[None]))
        gate_logits = first.mixer.in_proj(x)[..., 16:24] + first.mixer.gate_bias
    gates = torch.sigmoid(gate_logits[0])
    np.testing.assert_allclose(inside[0].memory, 1 / (1 - gates), rtol=1e-5)
    if pattern == ["rat"]:
        assert inside[0].weights is not None
        np.testing.assert_allclose(inside[0].weights, first.mixer.attention_weights(x)[0].detach(), rtol=1e-5)
    else:
        assert inside[0].weights is None


def test_memory_is_drawn_channel_by_channel_in_order(ax: Axes) -> None:
    memory = np.array([[4.0, 1.0, 9.0], [6.0, 1.0, 9.0], [5.0, 3.0, 1.0]])
    figures.lengths_of_memory(ax, {3: figures.Inside(memory, None)}, chunk_size=16)
    assert ax.lines[0].get_label() == "layer 3"
    assert ax.lines[0].get_ydata().tolist() == [1, 5, 9]
    assert set(ax.lines[1].get_ydata()) == {16}


def test_texts_become_labels() -> None:
    assert list(figures.visible([" the", "\n", " ", "$x$"])) == ["the", "↵", "␣", r"\$x\$"]
    assert figures.share_of_letters("ab c1.") == pytest.approx(4 / 6)
    assert figures.share_of_letters("") == 0
