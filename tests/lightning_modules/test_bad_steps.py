"""Steps that would spoil the model: found, left out or stopped at, and made again from what was saved."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

from lightning_modules import BadStepGuard, LanguageModel
from lightning_modules.bad_steps import BadStepError
from rat import ModelConfig

Make = Callable[..., Trainer]
Data = Callable[..., LightningDataModule]
Logged = Callable[[str], list[float]]


class Poison(Callback):
    """Multiplies the loss of some micro batches, and keeps the weights and AdamW's state after each of them."""

    def __init__(self, factors: dict[int, float], *, gradient_alone: bool = False) -> None:
        self.factors, self.gradient_alone = factors, gradient_alone
        self.states: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        factor = self.factors.get(batch_idx, 1.0)

        def spoil(model: Any, args: Any, loss: torch.Tensor) -> torch.Tensor:
            if not self.gradient_alone:
                return loss * factor
            loss.register_hook(lambda gradient: gradient * factor)
            return loss

        self.hook = pl_module.model.register_forward_hook(spoil)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LanguageModel, *_: Any) -> None:
        self.hook.remove()
        moments = [dict(state) for state in trainer.optimizers[0].state.values()]
        held = [x.clone() for x in pl_module.parameters()]
        self.states.append({"weights": held, "moments": [{k: x.clone() for k, x in m.items()} for m in moments]})


class Ruin(Callback):
    """Sets a weight to infinity before a micro batch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LanguageModel, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            with torch.no_grad():
                next(p for name, p in pl_module.named_parameters() if "norm" in name)[0] = float("inf")


def bad(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def fit(make: Make, config: ModelConfig, data: Data, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = make(callbacks=list(callbacks), limit_val_batches=0, **options)
    trainer.fit(LanguageModel(config), data())
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_loss_stops_before_it_is_made(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path, value: float
) -> None:
    poison = Poison({3: value})
    with pytest.raises(BadStepError, match=rf"step 1: the loss is {value}.*bad-step-1\.ckpt.*peak_lr"):
        fit(make_trainer, config, ragged, poison, BadStepGuard(), accumulate_grad_batches=2)
    saved = bad(tmp_path / "log" / "version_0" / "bad-step-1.ckpt")
    assert saved["global_step"] == 1
    for x, before in zip(saved["state_dict"].values(), poison.states[1]["weights"], strict=True):
        assert torch.equal(x, before)
    assert saved["bad_step"]["step"] == 1
    (found,) = saved["bad_step"]["micro_batches"]  # not the one before it in the same step
    assert (found["rank"], found["batch_idx"]) == (0, 3)
    assert torch.equal(found["batch"]["input_ids"], ragged().batches[3]["input_ids"])


def test_what_was_saved_makes_the_same_bad_step_again(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path
) -> None:
    with pytest.raises(BadStepError, match="step 2: the loss is nan"):
        fit(make_trainer, config, ragged, Ruin(), BadStepGuard())
    path = tmp_path / "log" / "version_0" / "bad-step-2.ckpt"
    module = LanguageModel.load_from_checkpoint(path, model=config)
    batch = bad(path)["bad_step"]["micro_batches"][0]["batch"]
    assert module.model(batch["input_ids"], labels=batch["labels"]).isnan()
    with pytest.raises(BadStepError, match="step 2: the loss is nan"):
        make_trainer(callbacks=BadStepGuard(), limit_val_batches=0).fit(LanguageModel(config), ragged(), ckpt_path=path)


@pytest.mark.parametrize("gradient_alone", [False, True])
def test_a_skipped_step_leaves_weights_and_optimiser_as_they_were(
    config: ModelConfig, ragged: Data, make_trainer: Make, logged: Logged, gradient_alone: bool
) -> None:
    poison, guard = Poison({2: float("nan")}, gradient_alone=gradient_alone), BadStepGuard(on_nan="skip")
    with pytest.warns(UserWarning, match="step 1: the .*; skipped, 1 so far"):
        trainer = fit(make_trainer, config, ragged, poison, guard, accumulate_grad_batches=2)
    after = poison.states[1::2]
    torch.testing.assert_close(after[1], after[0], rtol=0, atol=0)
    assert all(not torch.equal(x, y) for x, y in zip(after[1]["weights"], after[2]["weights"], strict=True))
    assert {float(state["step"]) for state in after[2]["moments"]} == {2.0}
    assert trainer.global_step == 3
    assert logged("train/skipped_steps") == [0, 1, 1]
    assert [math.isnan(norm) for norm in logged("train/grad_norm")] == [False, True, False]
    assert len(logged("train/loss")) == 3


def test_too_many_skipped_in_a_row_stop(config: ModelConfig, ragged: Data, make_trainer: Make) -> None:
    guard = BadStepGuard(on_nan="skip", max_skipped=2)
    poison = Poison({0: float("nan"), 2: float("nan"), 3: float("nan"), 4: float("nan")})
    with pytest.raises(BadStepError, match=r"step 4: .*after 2 skipped steps in a row"):
        fit(make_trainer, config, ragged, poison, guard, max_steps=6)
    assert guard.skipped == 3


def test_a_warning_lets_the_step_be_made(config: ModelConfig, ragged: Data, make_trainer: Make) -> None:
    poison = Poison({2: float("nan")})
    with pytest.warns(UserWarning, match="step 2: the loss is nan"):
        fit(make_trainer, config, ragged, poison, BadStepGuard(on_nan="warn"))
    assert poison.states[2]["weights"][0].isnan().all()


def test_a_spike_stops(config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path) -> None:
    guard = BadStepGuard(spike_window=2, spike_std=2.0, spike_rise=0.5)
    options = {"accumulate_grad_batches": 2, "max_steps": 4, "max_epochs": 2}
    with pytest.raises(BadStepError, match=r"step 2: the loss leaps to \d+\.\d+, above \d+\.\d+"):
        fit(make_trainer, config, ragged, Poison({4: 3.0}), guard, **options)
    (found,) = bad(tmp_path / "log" / "version_0" / "bad-step-2.ckpt")["bad_step"]["micro_batches"]
    assert found["batch_idx"] == 4
    assert found["loss"] == pytest.approx(3 * 3.47, rel=0.2)  # ln 32 = 3.47


def test_a_skipped_spike_is_none_of_the_losses_to_compare_with(
    config: ModelConfig, ragged: Data, make_trainer: Make
) -> None:
    guard = BadStepGuard(on_spike="skip", spike_window=2, spike_std=2.0, spike_rise=0.5)
    with pytest.warns(UserWarning, match="step 3: the loss leaps .*; skipped, 1 so far"):
        fit(make_trainer, config, ragged, Poison({3: 3.0}), guard, max_steps=4)
    assert max(guard.state_dict()["losses"]) < 5


def test_the_limit_is_above_mean_by_deviations_and_by_nats() -> None:
    guard = BadStepGuard(spike_window=4, spike_std=2.0, spike_rise=0.5)
    guard.load_state_dict({"losses": [3.0, 5.0, 3.0], "skipped": 0, "in_a_row": 0})
    assert guard._limit() == float("inf"), "the window is not full"
    guard.load_state_dict({"losses": [3.0, 5.0, 3.0, 5.0], "skipped": 0, "in_a_row": 0})
    assert guard._limit() == pytest.approx(4 + 2 * 1)
    guard.load_state_dict({"losses": [2.0] * 4, "skipped": 0, "in_a_row": 0})
    assert guard._limit() == pytest.approx(2.5)


def test_a_resumed_run_compares_with_the_same_losses(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path
) -> None:
    guard, again = BadStepGuard(on_nan="skip"), BadStepGuard(on_nan="skip")
    trainer = fit(make_trainer, config, ragged, Poison({2: float("nan")}), guard)
    assert len(guard.state_dict()["losses"]) == 2, "the skipped one is none of them"
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    seen: list[dict[str, Any]] = []
    look = Callback()
    look.on_train_start = lambda *_: seen.append(again.state_dict())  # type: ignore[method-assign]
    make_trainer(callbacks=[again, look], limit_val_batches=0, max_steps=4).fit(
        LanguageModel(config), ragged(), ckpt_path=tmp_path / "some.ckpt"
    )
    assert seen == [{**guard.state_dict(), "losses": seen[0]["losses"]}]
    assert seen[0]["losses"] == guard.state_dict()["losses"]
    assert len(again.state_dict()["losses"]) == 3


def test_gradients_that_are_scaled_may_be_infinite(
    config: ModelConfig, ragged: Data, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    callbacks = [Poison({1: float("inf")}, gradient_alone=True), BadStepGuard()]
    trainer = make_trainer(callbacks=callbacks, limit_val_batches=0, max_steps=2)
    monkeypatch.setattr(trainer.precision_plugin, "scaler", object(), raising=False)
    trainer.fit(LanguageModel(config), ragged())
    assert trainer.global_step == 2  # a scaler would have left out the second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spike_window": 1}, "spike_window must be at least 2, got 1"),
        ({"max_skipped": 0}, "max_skipped must be at least 1, got 0"),
        ({"spike_std": 0.0}, "spike_std must be above 0, got 0"),
        ({"spike_rise": float("nan")}, "spike_rise must be above 0, got nan"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BadStepGuard(**options)
