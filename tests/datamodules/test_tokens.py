from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from datamodules.shards import ShardError, ShardWriter
from datamodules.tokens import TokenDataModule

Make = Callable[..., Path]


def attached(data: Path, trainer: Trainer, **options: int) -> TokenDataModule:
    datamodule = TokenDataModule(data, **{"seq_len": 4, "batch_size": 4, **options})
    datamodule.trainer = trainer
    return datamodule


def cpu(**options: object) -> Trainer:
    return Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}  # type: ignore[arg-type]
    )


def test_a_prepared_folder_is_all_it_needs(counting: Make) -> None:
    datamodule = TokenDataModule(counting(89, 30), seq_len=4, batch_size=2)
    assert (datamodule.vocab_size, datamodule.eos_id, datamodule.val_bytes_per_token) == (60_001, 60_000, 3.0)
    datamodule.setup("fit")
    batches = list(datamodule.val_dataloader())
    first = torch.cat([batch["input_ids"][:, 0] for batch in batches])
    assert first[:7].tolist() == [0, 4, 8, 12, 16, 20, 24]
    assert (batches[-1]["labels"] == -100).all(dim=1).tolist() == [False, True]
    seen = torch.cat([batch["input_ids"][:, 0] for batch in datamodule.train_dataloader()])
    assert sorted(seen.tolist()) == list(range(0, 88, 4)) != seen.tolist()


def test_the_last_batch_of_an_epoch_is_filled_up_with_ignored_targets(counting: Make) -> None:
    (*_, last) = TokenDataModule(counting(89, 30), seq_len=4, batch_size=5).train_dataloader()
    assert (last["labels"] == -100).all(dim=1).tolist() == [False, False, True, True, True]


def test_tokens_can_be_limited_and_taken_in_order(counting: Make) -> None:
    options = {"seq_len": 4, "batch_size": 2, "max_tokens": 33, "shuffle": False}
    datamodule = TokenDataModule(counting(89, 30), **options)
    seen = torch.cat([batch["input_ids"][:, 0] for batch in datamodule.train_dataloader()])
    assert seen.tolist() == list(range(0, 32, 4))
    assert len(datamodule.dataset("val")) == 7


def test_seed_decides_the_order(counting: Make) -> None:
    data = counting(89, 30)
    orders = [
        [b["input_ids"][:, 0].tolist() for b in TokenDataModule(data, seq_len=4, seed=s).train_dataloader()]
        for s in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_raw_files_need_to_be_told_their_vocabulary(tmp_path: Path) -> None:
    np.array([5, 2, 7, 8], dtype="<u2").tofile(tmp_path / "raw.bin")
    raw = {"train_path": tmp_path / "raw.bin", "val_path": tmp_path / "raw.bin", "seq_len": 3, "batch_size": 1}
    datamodule = TokenDataModule(**raw, vocab_size=10, mask_documents=True)
    assert (datamodule.vocab_size, datamodule.eos_id, datamodule.val_bytes_per_token) == (10, 2, None)
    (batch,) = datamodule.val_dataloader()
    assert batch["labels"].tolist() == [[2, -100, 8]]
    assert batch["document_ids"].tolist() == [[0, 0, 1]]
    assert TokenDataModule(**raw, eos_id=7).eos_id == 7
    with pytest.raises(ValueError, match="give vocab_size"):
        _ = TokenDataModule(**raw).vocab_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, "no data: give path"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"global_batch_size": 0}, "global_batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenDataModule(**{"path": "somewhere", **options})  # type: ignore[arg-type]


def test_data_that_is_missing_or_too_small_is_named(counting: Make, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="nowhere/train does not exist"):
        TokenDataModule(tmp_path / "nowhere").setup("fit")
    with pytest.raises(ShardError, match="holds 30 tokens, fewer than the seq_len"):
        TokenDataModule(counting(89, 30), seq_len=40).setup("fit")
    with pytest.raises(ValueError, match=r"vocab_size=7 is smaller than that of .*60001"):
        TokenDataModule(counting(89, 30, name="c"), seq_len=4, vocab_size=7).setup("fit")
    with pytest.raises(ValueError, match="no val data"):
        TokenDataModule(train_path=tmp_path).setup("validate")


def test_checksums_are_compared_on_request(counting: Make) -> None:
    data = counting(89, 30)
    with (data / "val" / "shard-00000.bin").open("r+b") as stream:
        stream.write(b"\x07")
    TokenDataModule(data).prepare_data()
    with pytest.raises(ShardError, match=r"val/shard-00000.bin does not match its checksum"):
        TokenDataModule(data, verify_checksums=True).prepare_data()


def test_splits_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    for split, letter in (("train", "a"), ("val", "b")):
        with ShardWriter(tmp_path / split, vocab_size=9, eos_id=0, tokenizer_sha256=letter * 64) as writer:
            writer.write([1, 2, 3])
    with pytest.raises(ShardError, match="another tokenizer"):
        TokenDataModule(tmp_path, seq_len=2).setup("fit")


def test_a_global_batch_that_the_trainer_would_not_take_is_refused(counting: Make) -> None:
    data = counting(89, 30)
    assert attached(data, cpu(accumulate_grad_batches=2), global_batch_size=8).train_sampler()
    with pytest.raises(ValueError, match="set the Trainer's accumulate_grad_batches to 3"):
        attached(data, cpu(), global_batch_size=12).train_sampler()
    with pytest.raises(ValueError, match="choose a batch_size that divides it"):
        attached(data, cpu(), global_batch_size=6).train_sampler()


def test_a_trainer_that_replaces_the_sampler_is_refused(counting: Make) -> None:
    data = counting(89, 30)
    with pytest.raises(ValueError, match="set its use_distributed_sampler to false"):
        attached(data, cpu(devices=2, strategy="ddp_spawn")).setup("fit")
    attached(data, cpu(devices=2, strategy="ddp_spawn", use_distributed_sampler=False)).setup("fit")
    with pytest.raises(ValueError, match="overfit_batches would replace the sampler"):
        attached(data, cpu(overfit_batches=1)).setup("fit")


def test_a_run_does_not_go_on_with_another_tokenizer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for split in ("train", "val"):
            with ShardWriter(tmp_path / name / split, vocab_size=9, eos_id=0, tokenizer_sha256=name * 64) as writer:
                writer.write([1, 2, 3, 4, 5])
    first, second = (TokenDataModule(tmp_path / name, seq_len=2, batch_size=2) for name in ("a", "b"))
    state = {**first._identity(), "epoch": 0, "samples_consumed": 2, "samples_in_all_epochs": 2}
    first.load_state_dict(state)
    with pytest.raises(ValueError, match="trained with tokenizer_sha256=aaa"):
        second.load_state_dict(state)
    raw = tmp_path / "raw.bin"
    np.array([1, 2, 3, 4, 5], dtype="<u2").tofile(raw)
    third = TokenDataModule(train_path=raw, val_path=raw, vocab_size=9, seq_len=2, batch_size=2)
    with pytest.raises(ValueError, match=r"trained with tokenizer_sha256=aaa.*, this run has unknown: resume with"):
        third.load_state_dict(state)
    del state["tokenizer_sha256"]
    third.load_state_dict(state)
    with pytest.raises(ValueError, match="trained with tokenizer_sha256=unknown, this run has aaa"):
        first.load_state_dict(state)


def test_the_tokenizer_lies_beside_the_shards(counting: Make) -> None:
    data = counting(89, 30)
    assert TokenDataModule(data, seq_len=4).tokenizer_file is None
    (data / "tokenizer.json").touch()
    assert TokenDataModule(data, seq_len=4).tokenizer_file == data / "tokenizer.json"
    assert TokenDataModule(val_path=data / "val", seq_len=4).tokenizer_file == data / "tokenizer.json"
