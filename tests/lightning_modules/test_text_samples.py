"""Texts of a run, and a run that does not notice them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from ranks import together
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader

from lightning_modules import Dashboard, FSDP2Strategy, LanguageModel, TextSamples, Throughput, callbacks, text_samples
from rat import ModelConfig

Make = Callable[..., Trainer]
Data = Callable[..., LightningDataModule]
WORDS = [f"w{i}" for i in range(32)]
PROMPTS = ["w1 w2", "w3"]


@pytest.fixture
def data(ragged: Data, tmp_path: Path) -> Callable[[], LightningDataModule]:
    """The ragged batches, whose token i is the word wi; in an order that the global random state decides."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def make() -> LightningDataModule:
        made = ragged(tokenizer_file=tmp_path / "tokenizer.json", eos_id=31)
        made.train_dataloader = lambda: DataLoader(made.batches, batch_size=None, shuffle=True)
        return made

    return make


def samples(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """The texts by their names, each with its step."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if tag.startswith("samples/")
    }


def test_every_validation_continues_the_prompts(
    config: ModelConfig, data: Callable[[], Any], make_trainer: Make, tmp_path: Path
) -> None:
    logger, module = TensorBoardLogger(tmp_path, version=0), LanguageModel(config)
    trainer = make_trainer(
        logger=logger, callbacks=TextSamples(PROMPTS, max_new_tokens=5), num_sanity_val_steps=1, max_steps=4,
        val_check_interval=2, precision="bf16-mixed",
    )  # fmt: skip
    trainer.fit(module, data())
    trainer.validate(module, data())
    found = samples(Path(logger.log_dir))
    assert [step for texts in found.values() for step, _ in texts] == [2, 4] * 2
    ids = [[int(word[1:]) for word in prompt.split()] for prompt in PROMPTS]
    with torch.autocast("cpu", torch.bfloat16):
        last = module.model.generate(ids, max_new_tokens=5, eos_token_id=31)
    for i, tokens in enumerate(last):
        words = " ".join(WORDS[token] for token in ids[i] + tokens)
        assert found[f"samples/prompt_{i}/text_summary"][-1] == (4, f"    {words}")


def test_long_lines_are_broken_and_nothing_else_is_changed() -> None:
    text = "  " + "word " * 100 + "\n\n\tx  y"
    lines = text_samples._wrapped(text).split("\n")
    assert max(map(len, lines)) <= text_samples.WIDTH < len(text)
    assert "".join(lines) == text.expandtabs().replace("\n", "")
    assert lines[-2:] == ["", "        x  y"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_training_does_not_notice(
    config: ModelConfig, data: Callable[[], Any], make_trainer: Make, tmp_path: Path, temperature: float
) -> None:
    def weights(*callbacks: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = LanguageModel(config)
        # a new order of batches is drawn after each validation
        options = {"max_steps": 12, "logger": TensorBoardLogger(tmp_path, version=len(callbacks))}
        make_trainer(callbacks=list(callbacks), **options).fit(module, data())
        assert module.trainer.global_step == 12
        return [*module.state_dict().values(), torch.get_rng_state()]

    without = weights()
    watched = weights(TextSamples(PROMPTS, max_new_tokens=4, temperature=temperature))
    assert len(samples(tmp_path / "lightning_logs" / "version_1")) == 2
    assert all(torch.equal(x, y) for x, y in zip(without, watched, strict=True))


def test_texts_differ_by_the_weights_alone(
    config: ModelConfig, data: Callable[[], Any], make_trainer: Make, tmp_path: Path
) -> None:
    for version, seed in enumerate((0, 0, 1)):
        torch.manual_seed(0)
        sampler = TextSamples(PROMPTS, max_new_tokens=4, temperature=1.0, seed=seed)
        logger = TensorBoardLogger(tmp_path, version=version)
        make_trainer(callbacks=sampler, logger=logger, val_check_interval=3).fit(LanguageModel(config), data())
    first, again, other = (samples(tmp_path / "lightning_logs" / f"version_{version}") for version in range(3))
    assert first == again
    assert first != other


def test_the_time_of_texts_is_none_of_training(
    config: ModelConfig, data: Callable[[], Any], make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    now = type("Clock", (), {"perf_counter": lambda: clock[0]})
    monkeypatch.setattr("lightning.pytorch.callbacks.throughput_monitor.time", now)
    monkeypatch.setattr(callbacks, "time", now)
    monkeypatch.setattr(callbacks, "gemm_rate", lambda dtype, device: 1e6)

    class Slow(TextSamples):
        def _texts(self, *given: Any) -> list[str]:
            clock[0] += 1000
            return []

    class Module(LanguageModel):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            clock[0] += 0.5
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            clock[0] += 2
            super().validation_step(batch, batch_idx)

    logger = TensorBoardLogger(tmp_path, version=0)
    make_trainer(
        callbacks=[Throughput(window_size=2), Slow(PROMPTS)], logger=logger, max_steps=6, val_check_interval=2
    ).fit(Module(config), data())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    rates = [event.tensor_proto.float_val[0] for event in events.Tensors("train/device/items_per_sec")]
    assert rates == pytest.approx([48.0] * len(rates))  # 2 x 12 tokens in half a second
    assert len(rates) >= 4


def test_data_without_a_tokenizer_are_told_once(
    config: ModelConfig, ragged: Data, make_trainer: Make, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, version=0)
    with pytest.warns(UserWarning, match="writes nothing: the data know no tokenizer"):
        make_trainer(callbacks=TextSamples(PROMPTS), logger=logger).fit(LanguageModel(config), ragged())
    assert not samples(Path(logger.log_dir))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts must be a list of texts"),
        ({"prompts": "Return"}, "prompts must be a list of texts"),
        ({"prompts": ["a", ""]}, "none of them empty"),
        ({"prompts": PROMPTS, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompts": PROMPTS, "temperature": -1.0}, "temperature must be at least 0, got -1"),
    ],
)
def test_refusals_come_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextSamples(**options)


# --- two processes


def on_two_ranks(folder: Path, config: ModelConfig, data: LightningDataModule) -> None:
    for name, strategy in (("ddp", DDPStrategy), ("fsdp2", FSDP2Strategy)):
        torch.manual_seed(0)
        Trainer(
            accelerator="cpu", devices=2, strategy=strategy(), max_steps=2, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
            logger=TensorBoardLogger(folder, name="", version=name), log_every_n_steps=1, num_sanity_val_steps=0,
            callbacks=[Dashboard(), TextSamples(PROMPTS, max_new_tokens=5)], limit_train_batches=2,
        ).fit(LanguageModel(config), data)  # fmt: skip
        torch.distributed.destroy_process_group()


def test_one_process_of_two_writes_where_each_holds_whole_weights(
    config: ModelConfig, data: Callable[[], Any], tmp_path: Path
) -> None:
    made = data()
    del made.train_dataloader  # it cannot be sent to them
    together(2, on_two_ranks, tmp_path, config, made)
    assert all(len(list((tmp_path / name).glob("events*"))) == 1 for name in ("ddp", "fsdp2"))
    assert [step for texts in samples(tmp_path / "ddp").values() for step, _ in texts] == [2, 2]
    assert not samples(tmp_path / "fsdp2")
