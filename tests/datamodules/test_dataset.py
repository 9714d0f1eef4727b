from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.dataset import TokenDataset, TokenLoader, make_batch
from datamodules.sampler import PADDING, EvalSampler
from datamodules.shards import ShardError, ShardWriter, TokenShards

EOS = 9
TOKENS = [1, 2, EOS, 3, 4, EOS, EOS, 5, 6, 7, 8, EOS, 1, 2]


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    with ShardWriter(tmp_path / "a", vocab_size=10, eos_id=EOS, shard_tokens=5) as writer:
        writer.write(TOKENS)
    return TokenShards(tmp_path / "a")


def test_samples_follow_each_other(shards: TokenShards) -> None:
    dataset = TokenDataset(shards, 4, EOS)
    assert len(dataset) == 3
    assert dataset[np.array([2, 0])].tolist() == [TOKENS[8:13], TOKENS[:5]]
    assert dataset[np.array([1, PADDING])].tolist() == [TOKENS[4:9], [EOS] * 5]
    # thirteen inputs with their targets are all the tokens there are
    assert len(TokenDataset(shards, 13, EOS)) == 1


def test_batch_by_hand(shards: TokenShards) -> None:
    batch = make_batch(TokenDataset(shards, 7, EOS)[np.array([0, PADDING])], EOS, mask_documents=True)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 3, 4, 9, 9], [9] * 7]
    assert batch["labels"].tolist() == [[2, 9, -100, 4, 9, -100, -100], [-100] * 7]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5, 6]]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert all(value.is_contiguous() for value in batch.values())


def test_document_ids_come_only_if_asked_for(shards: TokenShards) -> None:
    assert set(make_batch(TokenDataset(shards, 4, EOS)[np.array([0])], EOS)) == {"input_ids", "labels"}


def test_too_few_tokens_are_refused(shards: TokenShards) -> None:
    with pytest.raises(ShardError, match="holds 14 tokens, fewer than the seq_len \\+ 1 = 15"):
        TokenDataset(shards, 14, EOS)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_batches(shards: TokenShards, num_workers: int) -> None:
    dataset = TokenDataset(shards, 4, EOS)
    loader = TokenLoader(dataset, EvalSampler(3, micro_batch=2), num_workers, mask_documents=True)
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    assert torch.cat([batch["input_ids"] for batch in batches])[:3].ravel().tolist() == TOKENS[:12]
    assert (batches[1]["labels"][1] == -100).all()
    assert set(batches[0]) == {"input_ids", "labels", "document_ids"}
