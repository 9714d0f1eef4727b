import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F

from datamodules.sampler import PADDING
from datamodules.sft.datamodule import SFTDataModule, SFTDataset
from datamodules.sft.examples import Examples
from datamodules.sft.prepare import prepare_sft
from datamodules.shards import ShardError, ShardWriter
from rat import CausalLM, ModelConfig

E = 9  # end of text
X = -100
FIELDS = ("prompts", "references")
LENGTHS = [[2, 2], [1, 3], [3, 1], [4, 2]]
EXAMPLES = [[1, 2, 3, E], [4, 5, 6, E], [7, 8, 2, E], [1, 3, 5, 7, 4, E]]


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    with ShardWriter(tmp_path / "hand", vocab_size=10, eos_id=E) as writer:
        for tokens in EXAMPLES:
            writer.write(tokens)
    np.save(tmp_path / "hand" / "examples.npy", np.array(LENGTHS, dtype=np.uint32))
    return Examples(tmp_path / "hand")


def test_padded_rows_by_hand(examples: Examples) -> None:
    batch = SFTDataset(examples, 6)[np.array([1, PADDING, 3])]
    assert batch["input_ids"].tolist() == [[4, 5, 6, E, E, E], [E] * 6, [1, 3, 5, 7, 4, E]]
    assert batch["labels"].tolist() == [[5, 6, E, X, X, X], [X] * 6, [X, X, X, 4, E, X]]
    assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(("input_ids", "labels"), torch.int64)


def test_packed_rows_by_hand(examples: Examples) -> None:
    dataset = SFTDataset(examples, 12, chunk_size=4)
    assert dataset.rows == [[3, 0], [1, 2]]  # padded to 8, 4 | 4, 4
    batch = dataset[np.array([0, 1, PADDING])]
    assert batch["input_ids"].tolist() == [
        [1, 3, 5, 7, 4, E, E, E, 1, 2, 3, E],
        [4, 5, 6, E, 7, 8, 2, E, E, E, E, E],
        [E] * 12,
    ]
    assert batch["labels"].tolist() == [
        [X, X, X, 4, E, X, X, X, X, 3, E, X],
        [5, 6, E, X, X, X, E, X, X, X, X, X],
        [X] * 12,
    ]
    assert batch["document_ids"].tolist() == [[0] * 8 + [1] * 4, [0] * 4 + [1] * 8, [0] * 12]
    assert batch["document_ids"].dtype == torch.int64


@pytest.mark.parametrize("pattern", [["rat"], ["attention"], ["rat", "sliding_window"], ["rnn"]])
def test_packed_examples_have_the_loss_of_padded_ones(prepared: Path, pattern: list[Any]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=257, d_model=32, num_layers=2, num_heads=4, pattern=pattern, chunk_size=4, num_groups=2,
        window_size=7, max_seq_len=96, init_std=0.2,
    )  # fmt: skip
    model = CausalLM(config).double()
    found = []
    for packing in (False, True):
        dataset = SFTDataModule(prepared, seq_len=96, packing=packing, chunk_size=4).dataset("train")
        batch = dataset[np.arange(len(dataset))]
        logits = model(batch["input_ids"], document_ids=batch.get("document_ids"))
        nll = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none").view(len(dataset), -1)
        losses = torch.empty(22, dtype=torch.float64)
        for row, documents in enumerate(dataset.rows):
            ids = batch["document_ids"][row] if packing else torch.zeros(96, dtype=torch.int64)
            for number, document in enumerate(documents):
                counted = dataset.examples.lengths[document, 1]
                assert (batch["labels"][row][ids == number] != -100).sum() == counted
                losses[document] = nll[row][ids == number].sum() / counted
        loss = model(**batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((losses, loss, gradients, len(dataset)))
    (padded, mean, gradients, rows), (packed, packed_mean, packed_gradients, packed_rows) = found
    assert packed_rows < rows == 22
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed_mean, mean, rtol=1e-6, atol=0)
    for one, other in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_loaders(prepared: Path, plain_rows: Callable[..., Any], packing: bool, num_workers: int) -> None:
    data = SFTDataModule(
        prepared, seq_len=96, packing=packing, chunk_size=4, batch_size=4, num_workers=num_workers
    )  # fmt: skip
    assert (data.vocab_size, data.eos_id) == (257, Examples(prepared / "test").eos_id)
    names = {"input_ids", "labels", "document_ids"} if packing else {"input_ids", "labels"}
    for split in ("train", "val", "test"):
        examples = Examples(prepared / split)
        batches = list(getattr(data, f"{split}_dataloader")())
        assert {tuple(batch["input_ids"].shape) for batch in batches} == {(4, 96)}
        assert all(set(batch) == names for batch in batches)
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        answers = sorted(examples[i][1].tolist() for i in range(len(examples)))
        found = np.split(labels[labels != -100].numpy(), np.flatnonzero(labels[labels != -100] == data.eos_id) + 1)[:-1]
        assert sorted(part.tolist() for part in found) == answers
    batches = list(data.predict_dataloader())
    assert [len(batch["prompts"]) for batch in batches] == [4, 1]
    examples = Examples(prepared / "test")
    found = [
        (prompt.tolist(), known) for batch in batches for prompt, known in zip(*map(batch.get, FIELDS), strict=True)
    ]
    answers = [example["answer"] for example in plain_rows(5, 200)]
    assert found == [
        (examples[i][0].tolist(), {"task": "jsonl", "index": i, "input": f"q{200 + i}?", "answers": [answers[i]]})
        for i in range(5)
    ]
    assert {(batch["eos_id"], batch["max_new_tokens"]) for batch in batches} == {(data.eos_id, 16)}
    assert {prompt.dtype for batch in batches for prompt in batch["prompts"]} == {torch.int64}


def test_ranks_share_the_prompts_and_padding_is_none(prepared: Path) -> None:
    dataset = SFTDataModule(prepared, seq_len=96, max_new_tokens=3).dataset("predict")
    batch = dataset[np.array([4, PADDING, PADDING])]
    assert [known["index"] for known in batch["references"]] == [4]
    assert batch["max_new_tokens"] == 3
    assert dataset[np.array([PADDING])]["prompts"] == []


def test_tasks_are_told_apart_by_their_setting(
    tokenizer: Path, write_rows: Callable[..., Path], hub_rows: dict[str, Any], tmp_path: Path
) -> None:
    source = write_rows({split: [hub_rows["narrativeqa"]] for split in ("train", "validation", "test")})
    prepare_sft(tmp_path / "out", "narrativeqa", str(tokenizer), source, setting="full", seq_len=160)
    (known,) = SFTDataModule(tmp_path / "out").dataset("predict").references
    assert known == {"task": "narrativeqa (full)", "index": 0, "input": "Who?", "answers": ["Ann", "Ann B."]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prepare.json", None, "prepare.json does not tell the task and the length of its answers"),
        ("prepare.json", '{"made_with": {"task": "jsonl"}}', "prepare.json does not tell the task"),
        ("prepare.json", "[]", "prepare.json does not tell the task"),
        ("test/references.jsonl", None, "references.jsonl is missing or damaged"),
        ("test/references.jsonl", "{", "references.jsonl is missing or damaged"),
        ("test/references.jsonl", "{}\n", "references.jsonl is of 1 examples, not of 5"),
    ],
)
def test_prompts_without_references_are_refused(prepared: Path, name: str, content: str | None, message: str) -> None:
    (prepared / name).unlink()
    if content is not None:
        (prepared / name).write_text(content)
    with pytest.raises(ShardError, match=message):
        SFTDataModule(prepared, seq_len=96).setup("predict")


class Recorder(LightningModule):
    """A model whose weight depends on which rows it saw, and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        keys = (batch["input_ids"] * torch.arange(1, 97)).sum(dim=1)
        self.seen += keys.tolist()
        return (self.weight - keys.double() / 1e6).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Save(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.global_step}.ckpt")


def fit(data: Path, root: Path, ckpt: Path | None = None, **options: Any) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
        enable_checkpointing=False, use_distributed_sampler=False, limit_val_batches=0, default_root_dir=root,
        callbacks=[Save()],
    )  # fmt: skip
    trainer.fit(
        module, SFTDataModule(data, **{"seq_len": 96, "chunk_size": 4, "batch_size": 4, **options}), ckpt_path=ckpt
    )
    return module


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_sees_what_an_unbroken_one_does(prepared: Path, tmp_path: Path, packing: bool) -> None:
    whole = fit(prepared, tmp_path / "whole", packing=packing)
    assert len(whole.seen) >= 30
    for step in (1, 3, len(whole.seen) // 8, len(whole.seen) // 8 + 2):
        resumed = fit(prepared, tmp_path / "again", tmp_path / "whole" / f"{step}.ckpt", packing=packing)
        assert resumed.seen == whole.seen[4 * step :]
        assert resumed.weight.item() == whole.weight.item()
    with pytest.raises(ValueError, match="the checkpoint was trained with"):
        fit(prepared, tmp_path / "again", tmp_path / "whole" / "1.ckpt", packing=not packing)


def test_rows_of_another_kind_are_other_data(prepared: Path) -> None:
    options = [{}, {"packing": True}, {"packing": True, "chunk_size": 8}, {"seq_len": 128}]
    found = [SFTDataModule(prepared, **{"seq_len": 96, **given}).identity() for given in options]  # type: ignore[arg-type]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_stages_open_what_they_need(prepared: Path, caplog: pytest.LogCaptureFixture) -> None:
    for stage, splits in {
        "fit": ["train", "val"],
        "validate": ["val"],
        "test": ["test"],
        "predict": ["predict"],
    }.items():
        data = SFTDataModule(prepared, seq_len=96, chunk_size=4, packing=True)
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            data.setup(stage)
        assert list(data._datasets) == splits
    assert [record.message for record in caplog.records if "packing saves" in record.message] == [
        "36.9% padding in padded rows, 22.9% in packed ones: packing saves 49.2% of it"
    ]


def test_what_does_not_fit_is_named(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"nowhere/train does not exist; make it with: python cli.py prepare sft"):
        SFTDataModule(tmp_path / "nowhere").setup("fit")
    with pytest.raises(ValueError, match=r"seq_len=48 is too short for .*train, where .* or prepare sft --seq_len 48"):
        SFTDataModule(prepared, seq_len=48).setup("fit")
    with pytest.raises(ValueError, match="seq_len=98 must be a multiple of chunk_size=4"):
        SFTDataModule(prepared, seq_len=98, packing=True, chunk_size=4).setup("fit")
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        SFTDataModule(prepared, chunk_size=0)
    with pytest.raises(ValueError, match="seq_len=0 must be at least 1"):
        SFTDataModule(prepared, seq_len=0)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        SFTDataModule(prepared, max_new_tokens=0)


def test_splits_of_two_tokenizers_are_refused(prepared: Path) -> None:
    index = prepared / "val" / "index.json"
    known = Examples(prepared / "val").shards.index.tokenizer_sha256 or ""
    index.write_text(index.read_text().replace(known, "b" * 64))
    with pytest.raises(ShardError, match="another tokenizer"):
        SFTDataModule(prepared, seq_len=96).setup("fit")


def test_checksums_are_compared_on_request(prepared: Path) -> None:
    with (prepared / "test" / "shard-00000.bin").open("r+b") as stream:
        stream.write(b"\x07")
    SFTDataModule(prepared).prepare_data()
    with pytest.raises(ShardError, match=r"test/shard-00000.bin does not match its checksum"):
        SFTDataModule(prepared, verify_checksums=True).prepare_data()
