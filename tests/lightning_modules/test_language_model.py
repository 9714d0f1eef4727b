"""The LightningModule in a real Trainer: what it logs, weighs, accumulates, saves and refuses."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules import LanguageModel, OptimizerConfig, language_model
from lightning_modules.schedule import learning_rate
from rat import CausalLM, ModelConfig, ops

Make = Callable[..., Trainer]
Data = Callable[..., LightningDataModule]
Logged = Callable[[str], list[float]]


def nll_and_count(model: CausalLM, batches: list[dict[str, torch.Tensor]]) -> tuple[float, int]:
    """By the logits, in double precision, over all batches at once."""
    nll, count = 0.0, 0
    for batch in batches:
        logits = model.double()(batch["input_ids"])
        nll += F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum").item()
        count += int((batch["labels"] != -100).sum())
    return nll, count


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_are_weighted_by_tokens(config: ModelConfig, ragged: Data, make_trainer: Make, stage: str) -> None:
    module, data = LanguageModel(config), ragged()
    (metrics,) = getattr(make_trainer(), stage)(module, data, verbose=False)
    nll, count = nll_and_count(module.model, data.batches)
    name = {"validate": "val", "test": "test"}[stage]
    assert metrics[f"{name}/loss"] == pytest.approx(nll / count, rel=1e-6)
    assert metrics[f"{name}/perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-6)
    assert metrics[f"{name}/bits_per_byte"] == pytest.approx(nll / count / math.log(2) / 3, rel=1e-6)


def test_without_known_bytes_there_are_no_bits_per_byte(config: ModelConfig, ragged: Data, make_trainer: Make) -> None:
    (metrics,) = make_trainer().validate(LanguageModel(config), ragged(val_bytes_per_token=None), verbose=False)
    assert set(metrics) == {"val/loss", "val/perplexity"}


def test_prediction_is_the_loss_of_each_sequence(config: ModelConfig, ragged: Data, make_trainer: Make) -> None:
    module, data = LanguageModel(config), ragged()
    predicted = make_trainer().predict(module, data)
    for batch, rows in zip(data.batches, predicted, strict=True):
        for i in range(2):
            nll, count = nll_and_count(module.model, [{name: x[i : i + 1] for name, x in batch.items()}])
            assert rows["tokens"][i] == count
            assert rows["nll"][i].item() == pytest.approx(nll / max(count, 1), rel=1e-5)


def test_what_a_step_logs(config: ModelConfig, ragged: Data, make_trainer: Make, logged: Logged) -> None:
    module, data = LanguageModel(config, global_batch_size=4), ragged()
    module.configure_model()
    start = {name: x.clone() for name, x in module.model.state_dict().items()}
    trainer = make_trainer()
    trainer.fit(module, data)
    assert trainer.accumulate_grad_batches == 2
    assert logged("train/tokens") == [2 * 2 * 12 * n for n in (1, 2, 3)]
    assert logged("train/lr") == pytest.approx([learning_rate(n, 3, OptimizerConfig()) for n in range(3)], rel=1e-6)
    again = CausalLM(config)
    again.load_state_dict(start)
    again(**joined(data.batches[:2])).backward()
    norm = torch.stack([p.grad.norm() for p in again.parameters()]).norm().item()
    assert norm > 1, "clipping must have something to do"
    assert logged("train/grad_norm")[0] == pytest.approx(norm, rel=1e-5)
    again.load_state_dict(start)
    nll, count = nll_and_count(again, data.batches[:2])
    assert logged("train/loss")[0] == pytest.approx(nll / count, rel=1e-5)


def test_the_loss_of_a_step_starts_anew(config: ModelConfig, ragged: Data, make_trainer: Make, logged: Logged) -> None:
    # with a learning rate of almost nothing every step sees the weights of the start
    module, data = LanguageModel(config, OptimizerConfig(peak_lr=1e-12, eta_min=0.0), global_batch_size=4), ragged()
    make_trainer().fit(module, data)
    per_step = [nll_and_count(module.model, data.batches[i : i + 2]) for i in (0, 2, 4)]
    assert logged("train/loss") == pytest.approx([nll / count for nll, count in per_step], rel=1e-5)


def test_three_steps_are_those_of_plain_pytorch(config: ModelConfig, ragged: Data, make_trainer: Make) -> None:
    """AdamW, schedule, clipping and accumulation together, against a loop that has nothing of ours but the model."""
    module, data = LanguageModel(config, global_batch_size=4), ragged()
    module.configure_model()
    plain = CausalLM(config)
    plain.load_state_dict(module.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for n in range(3):  # N = 3, no warm-up
        plain(**joined(data.batches[2 * n : 2 * n + 2])).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-6 + (8e-4 - 1e-6) * (1 + math.cos(math.pi * n / 3)) / 2
        optimizer.step()
        optimizer.zero_grad()
    make_trainer().fit(module, data)
    for name, x in module.model.state_dict().items():
        torch.testing.assert_close(x, plain.state_dict()[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("precision", "computes_in"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_weights_stay_fp32_whatever_products_are_in(
    config: ModelConfig, ragged: Data, make_trainer: Make, precision: str, computes_in: torch.dtype
) -> None:
    module, seen = LanguageModel(config), set()
    module.configure_model()
    module.model.layers[0].mixer.in_proj.register_forward_hook(lambda layer, args, out: seen.add(out.dtype))
    make_trainer(precision=precision).fit(module, ragged())
    assert seen == {computes_in}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_logits_are_never_stored_whole(ragged: Data) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
            return result

    vocab_size, tokens = 5000, (8, 512)
    model = CausalLM(ModelConfig(vocab_size=vocab_size, d_model=8, num_layers=1, num_heads=2, max_seq_len=512))
    ids = torch.randint(vocab_size, tokens)
    with Largest() as largest:
        model(ids, ids).backward()
    assert largest.numel < math.prod(tokens) * vocab_size / 20


def test_validation_counts_in_optimiser_steps(
    config: ModelConfig, ragged: Data, make_trainer: Make, logged: Logged
) -> None:
    module = LanguageModel(config, global_batch_size=6, val_every_n_steps=2)
    make_trainer(max_steps=5).fit(module, ragged())
    assert len(logged("train/loss")) == 5
    assert len(logged("val/loss")) == 2


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({}, {"global_batch_size": 3}, r"global_batch_size 3 .*batch_size 2 x 1 devices"),
        ({"batch_size": None}, {"global_batch_size": 4}, r"needs a data module with a batch_size"),
        ({"vocab_size": 50}, {}, r"the data has 50 token ids, the model only 32: set model.model.vocab_size to 50"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    config: ModelConfig, ragged: Data, make_trainer: Make,
    data: dict[str, Any], options: dict[str, Any], message: str,
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(LanguageModel(config, **options), ragged(**data))


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("triton", "triton cannot run: its kernels need an NVIDIA GPU"),
        ("flex", "flex cannot train: FlexAttention has no"),
    ],
)
def test_a_backend_that_cannot_train_here_is_refused_before_anything_is_built(
    config: ModelConfig, ragged: Data, make_trainer: Make, backend: ops.Backend, reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ops.backend, "INTERPRETED", False)
    module = LanguageModel(config, kernel_backend=backend)
    with pytest.raises(ValueError, match=reason):
        make_trainer().fit(module, ragged())
    assert module.model is None
    assert ops.get_backend() == "auto"


def test_the_log_says_once_which_backend_runs(
    config: ModelConfig, ragged: Data, make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    language_model._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        for backend in ("auto", "portable", "auto"):
            make_trainer(max_steps=1).fit(LanguageModel(config, kernel_backend=backend), ragged())
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("kernel backend")]
    assert [line.split(" on ")[0] for line in said] == [said[0].split(" on ")[0], "kernel backend portable"]
    assert said[0].startswith("kernel backend auto: ")


@pytest.mark.parametrize(
    ("precision", "capabilities", "hints"),
    [
        ("bf16-mixed", {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, 1),
        ("bf16-mixed", {"avx2": True, "avx512_bf16": True, "amx_bf16": False}, 0),
        ("bf16-mixed", {"neon": True, "bf16": True}, 0),
        ("32-true", {"avx2": True}, 0),
    ],
)
def test_the_log_hints_at_fp32_where_bf16_is_slow(
    config: ModelConfig,
    ragged: Data,
    make_trainer: Make,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    capabilities: dict[str, bool],
    hints: int,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    language_model._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        make_trainer(max_steps=1, precision=precision).fit(LanguageModel(config), ragged())
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("trainer.precision")]
    hint = "trainer.precision bf16-mixed: this CPU has no bf16 instructions, 32-true is faster on it"
    assert said == hints * [hint]


def test_a_schedule_without_an_end_is_refused(config: ModelConfig, ragged: Data, make_trainer: Make) -> None:
    with pytest.raises(ValueError, match=r"set trainer.max_steps"):
        make_trainer(max_steps=-1, max_epochs=-1).fit(LanguageModel(config), ragged())


def test_checkpoints_hold_plain_data_and_know_their_architecture(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path
) -> None:
    module, data, path = LanguageModel(config), ragged(), tmp_path / "some.ckpt"
    trainer = make_trainer()
    trainer.fit(module, data)
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert ModelConfig.from_dict(content["model_config"]) == config
    assert set(content["state_dict"]) == {f"model.{name}" for name in CausalLM(config).state_dict()}

    # fields that only say how weights start may differ
    restored = LanguageModel(ModelConfig.from_dict({**config.to_dict(), "init_std": 0.5}))
    make_trainer(logger=False).validate(restored, data, ckpt_path=path, verbose=False)
    for name, x in restored.model.state_dict().items():
        torch.testing.assert_close(x, module.model.state_dict()[name], rtol=0, atol=0)

    other = LanguageModel(ModelConfig.from_dict({**config.to_dict(), "chunk_size": 2, "d_model": 32}))
    with pytest.raises(ValueError, match=r"another model.*d_model is 16, not 32; chunk_size is 4, not 2"):
        make_trainer(logger=False).validate(other, data, ckpt_path=path)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, path)
    with pytest.raises(ValueError, match="holds no model_config"):
        make_trainer(logger=False).validate(LanguageModel(config), data, ckpt_path=path)


def test_a_checkpoint_of_another_version_is_loaded_with_a_warning(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trainer = tmp_path / "some.ckpt", make_trainer(max_steps=1)
    trainer.fit(LanguageModel(config), ragged())
    monkeypatch.setattr(language_model, "version", lambda name: "0.0.9")
    trainer.save_checkpoint(path)
    monkeypatch.setattr(language_model, "version", lambda name: "0.2.0")
    with pytest.warns(UserWarning, match=r"written by rat-lab 0\.0\.9, this is 0\.2\.0"):
        make_trainer(max_steps=2).fit(LanguageModel(config), ragged(), ckpt_path=path)


def test_training_starts_from_a_saved_model(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path
) -> None:
    saved = CausalLM(config)
    saved.save_pretrained(tmp_path / "model")
    module = LanguageModel(config, init_from=tmp_path / "model")
    make_trainer().validate(module, ragged(), verbose=False)
    for name, x in module.model.state_dict().items():
        torch.testing.assert_close(x, saved.state_dict()[name], rtol=0, atol=0)


def test_activation_checkpointing_changes_no_gradient_and_no_name(config: ModelConfig, ragged: Data) -> None:
    plain, other = LanguageModel(config), LanguageModel(config, activation_checkpointing=True)
    plain.configure_model()
    other.configure_model()
    assert list(other.state_dict()) == list(plain.state_dict())
    other.model.load_state_dict(plain.model.state_dict())
    batch = ragged().batches[1]
    for module in (plain, other):
        module.model(batch["input_ids"], batch["labels"]).backward()
    for mine, theirs in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def test_activation_checkpointing_keeps_less(config: ModelConfig) -> None:
    def kept(module: LanguageModel) -> int:
        module.configure_model()
        sizes, ids = [], torch.zeros(4, 12, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            module.model(ids, ids)
        return sum(sizes)

    assert kept(LanguageModel(config, activation_checkpointing=True)) < kept(LanguageModel(config)) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rounding"), [("32-true", 1e-5), ("bf16-mixed", 1e-3)])
def test_a_compiled_model_trains_alike_under_the_same_names(
    config: ModelConfig, ragged: Data, make_trainer: Make, logged: Logged, precision: str, rounding: float
) -> None:
    losses, names = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = LanguageModel(config, OptimizerConfig(peak_lr=1e-2), compile=compiled)
        make_trainer(precision=precision).fit(module, ragged())
        losses.append(logged("train/loss"))
        names.append(list(module.state_dict()))
    assert names[1] == names[0]
    assert losses[1] == pytest.approx(losses[0], rel=rounding)


def test_compiling_is_done_only_on_request(config: ModelConfig) -> None:
    modules = LanguageModel(config), LanguageModel(config, compile=True)
    for module in modules:
        module.configure_model()
    assert [module.model._compiled_call_impl is not None for module in modules] == [False, True]
    assert list(modules[1].state_dict()) == list(modules[0].state_dict())


def test_the_model_can_be_built_without_memory(config: ModelConfig) -> None:
    module = LanguageModel(config)
    with torch.device("meta"):
        module.configure_model()
    assert all(p.is_meta for p in module.parameters())


def test_weights_start_in_fp32_whatever_they_were_saved_in(tmp_path: Path, config: ModelConfig) -> None:
    CausalLM(config).bfloat16().save_pretrained(tmp_path / "half")
    module = LanguageModel(config, init_from=tmp_path / "half")
    module.configure_model()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
