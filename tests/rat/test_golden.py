"""Agreement with an independent implementation of the published architecture."""

from collections.abc import Callable

import pytest
import torch

from lightning_modules.schedule import OptimizerConfig, adamw, learning_rate
from rat import CausalLM
from rat.ops import Backend, use_backend

CASES = ["rat", "attention", "rnn", "local", "rat_local", "attention_local", "rat_chunk1", "rat_chunkT"]
RUNS = [(name, "auto") for name in CASES] + [(name, "reference") for name in CASES]


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_logits_loss_and_every_gradient_agree(
    name: str, backend: Backend, golden: Callable, assert_close: Callable
) -> None:
    case = golden(name)
    model = case.model()
    with use_backend(backend):
        assert_close(model(case.tensors["input_ids"]), case.tensors["logits"])
        loss = model(case.tensors["input_ids"], case.tensors["labels"])
        loss.backward()
    assert loss.item() == pytest.approx(case.tensors["loss"].item(), rel=1e-5)
    parameters, gradients = dict(model.named_parameters()), case.gradients()
    assert parameters.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(parameters[name].grad, gradient, what=name)


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_greedy_continuations_are_the_same_tokens(name: str, backend: Backend, golden: Callable) -> None:
    case = golden(name)
    model, facts = case.model(), case.facts["generate"]
    longest = max(len(fact["continuation"]) for fact in facts)
    with use_backend(backend):
        together = model.generate([fact["prompt"] for fact in facts], max_new_tokens=longest)
        for fact, text in zip(facts, together, strict=True):
            expected = fact["continuation"]
            assert text[: len(expected)] == expected
            assert model.generate([fact["prompt"]], max_new_tokens=len(expected)) == [expected]


@pytest.mark.parametrize("name", CASES)
def test_ten_training_steps_agree(name: str, golden: Callable) -> None:
    case = golden(name)
    model, steps = case.model(), case.facts["train"]
    config = OptimizerConfig(peak_lr=1e-3)
    optimizer, schedule = adamw(model.parameters(), 40, config)
    assert len(steps) == 10
    # The recorded first step was made on top of the gradients of `loss`, which nobody had emptied.
    model(case.tensors["input_ids"], case.tensors["labels"]).backward()
    for n, fact in enumerate(steps):
        tokens = case.tensors[f"train_batch_{n}"]
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert optimizer.param_groups[0]["lr"] == learning_rate(n, 40, config) == pytest.approx(fact["lr"], rel=1e-12)
        assert loss.item() == pytest.approx(fact["loss"], abs=1e-4)
        assert norm.item() == pytest.approx(fact["grad_norm"], rel=1e-3)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize("name", ["rat", "rat_local"])
@pytest.mark.parametrize("told", ["the whole config", "what the file does not tell"])
def test_released_files_load(
    name: str, told: str, golden: Callable, assert_close: Callable, assert_same_weights: Callable
) -> None:
    case = golden(name)
    path = case.folder / "released_layout.pth"
    if told == "the whole config":
        model = CausalLM.from_pretrained(path, case.config)
        assert model.config == case.config
    else:
        known: dict[str, int] = {"num_heads": 4, "chunk_size": 8} | ({"window_size": 8} if "local" in name else {})
        model = CausalLM.from_pretrained(path, known)
        assert model.config.layer_names() == case.config.layer_names()
        assert model.config.num_groups == 2
    assert_same_weights(model, case.model())
    assert_close(model(case.tensors["input_ids"]), case.tensors["logits"])
