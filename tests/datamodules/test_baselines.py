from pathlib import Path

import numpy as np
import pytest

from datamodules.baselines import Pairs, ngram_baselines, trained_pairs, validation_pairs
from datamodules.shards import ShardWriter
from datamodules.tokens import TokenDataModule


def pairs(*both: tuple[int, int]) -> Pairs:
    return Pairs(*np.array(both).T)


def test_perplexities_by_hand() -> None:
    # after 0: twice 1, once 2; after 1: once 0; nothing after 2; three tokens
    train = pairs((0, 1), (0, 1), (0, 2), (1, 0))
    validation = pairs((0, 1), (0, 0), (1, 2), (2, 1))
    result = ngram_baselines(train, validation, 3)
    # targets 1, 1, 2, 0 and one more of each: 2/7, 3/7, 2/7
    assert result.unigram == pytest.approx((3 / 7 * 2 / 7 * 2 / 7 * 3 / 7) ** -0.25)

    def bigram(d: float) -> float:
        base = 1 / 3  # every token stood behind one kind of token: (1 + 1) / (3 + 3)
        seen = (2 - d + d * 2 * base) / 3
        product = seen * (d * 2 * base / 3) * (d * 1 * base / 1) * base
        return product**-0.25

    assert result.discount == pytest.approx(1)
    assert result.bigram == pytest.approx(bigram(1))


def test_the_best_discount_is_found() -> None:
    train = pairs(*[(0, 1)] * 10, (0, 2), (0, 3))
    result = ngram_baselines(train, pairs(*[(0, 1)] * 10, (0, 2), (0, 3)), 5)
    assert result.discount == pytest.approx(0.05)
    assert result.bigram < result.unigram


@pytest.mark.parametrize("discount", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("model", ["unigram", "bigram"])
def test_probabilities_sum_to_one(model: str, discount: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.baselines._DISCOUNTS", [discount])
    generator = np.random.default_rng(0)
    train = Pairs(generator.integers(6, size=40), generator.integers(7, size=40))
    for token in range(7):  # the last one is never an input
        # with one validation pair the perplexity is the inverse of its probability
        results = [ngram_baselines(train, pairs((token, target)), 7) for target in range(7)]
        assert sum(1 / getattr(result, model) for result in results) == pytest.approx(1)


def test_text_that_repeats_is_predicted() -> None:
    cycle = np.arange(5000) % 50
    result = ngram_baselines(Pairs(cycle[:-1], cycle[1:]), Pairs(cycle[:-1], cycle[1:]), 50)
    assert result.unigram == pytest.approx(50, rel=0.01)
    assert result.bigram == pytest.approx(1, abs=0.01)


def test_trained_pairs_are_those_of_the_loader(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(10, size=100)
    for split in ("train", "val"):
        with ShardWriter(tmp_path / split, vocab_size=10, eos_id=9, shard_tokens=30) as writer:
            writer.write(tokens)
    datamodule = TokenDataModule(tmp_path, seq_len=7, batch_size=2, global_batch_size=4)
    loader = datamodule.train_dataloader()
    batches = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    assert len(batches) == 3 * 8
    for num_batches in (0, 1, 6, 7, 18):
        labels = np.concatenate([np.empty((0, 7), int), *[batch["labels"].numpy() for batch in batches[:num_batches]]])
        inputs = np.concatenate(
            [np.empty((0, 7), int), *[batch["input_ids"].numpy() for batch in batches[:num_batches]]]
        )
        found = trained_pairs(datamodule, 2 * num_batches)
        assert found.inputs.tolist() == inputs[labels != -100].tolist()
        assert found.targets.tolist() == labels[labels != -100].tolist()
    val = validation_pairs(datamodule)
    kept = [i for i in range(98) if tokens[i] != 9]
    assert val.inputs.tolist() == tokens[kept].tolist()
    assert val.targets.tolist() == tokens[np.array(kept) + 1].tolist()


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (Pairs(np.empty(0, int), np.empty(0, int)), pairs((0, 1)), "no training pairs"),
        (pairs((0, 1)), Pairs(np.empty(0, int), np.empty(0, int)), "no validation pairs"),
        (pairs((0, 1)), pairs((0, 3)), "validation token 3 lies outside the vocabulary of 3"),
    ],
)
def test_nothing_to_count_is_refused(train: Pairs, validation: Pairs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ngram_baselines(train, validation, 3)
