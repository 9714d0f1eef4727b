import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from datamodules.sampler import PADDING, EvalSampler, TrainSampler, shuffled

SEEDS = st.integers(0, 2**40)


def micro_steps(world_size: int, **options: int) -> list[list[int]]:
    """What all ranks together take in each micro step."""
    ranks = [TrainSampler(rank=rank, world_size=world_size, **options) for rank in range(world_size)]  # type: ignore[misc]
    return [np.concatenate(step).tolist() for step in zip(*ranks, strict=True)]


def flat(steps: list[list[int]]) -> list[int]:
    return [sample for step in steps for sample in step]


@given(total=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 50))
def test_the_order_is_a_permutation(total: int, seed: int, epoch: int) -> None:
    samples = shuffled(np.arange(total), total, seed, epoch)
    assert np.array_equal(np.sort(samples), np.arange(total))


@given(total=st.integers(1, 2**45), seed=SEEDS, data=st.data())
def test_any_place_of_a_huge_order_can_be_asked_for(total: int, seed: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=20, unique=True)))
    samples = shuffled(places, total, seed, 0)
    assert len(set(samples.tolist())) == len(places)
    assert samples.min() >= 0
    assert samples.max() < total
    assert np.array_equal(samples[::-1], shuffled(places[::-1], total, seed, 0))


def test_the_order_looks_random() -> None:
    total = 40_000
    orders = [shuffled(np.arange(total), total, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(total))[0, 1]) < 0.02
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
        # as many neighbours stay neighbours as by chance: two
        assert (np.abs(np.diff(order)) == 1).sum() < 12
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 0.02


def test_the_order_never_changes() -> None:
    # checkpoints of earlier versions rely on it
    assert shuffled(np.arange(10), 10, 1, 2).tolist() == [6, 1, 5, 0, 8, 3, 9, 2, 7, 4]


@settings(deadline=None, max_examples=60)
@given(
    world_size=st.sampled_from([1, 2, 3, 4]),
    micro_batch=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    extra=st.integers(0, 11),
    steps=st.integers(1, 6),
    seed=SEEDS,
    epoch=st.integers(0, 3),
)
def test_ranks_share_the_one_global_order(
    world_size: int, micro_batch: int, accumulate: int, extra: int, steps: int, seed: int, epoch: int
) -> None:
    global_batch = world_size * micro_batch * accumulate
    total = max(1, global_batch * steps - min(extra, global_batch - 1))
    options = {"total": total, "global_batch": global_batch, "seed": seed, "epoch": epoch}
    taken = micro_steps(world_size, micro_batch=micro_batch, **options)
    alone = micro_steps(1, micro_batch=global_batch, **options)
    assert len(alone) == steps
    assert flat(taken) == flat(alone)
    assert flat(taken)[:total] == shuffled(np.arange(total), total, seed, epoch).tolist()
    assert flat(taken)[total:] == [PADDING] * (global_batch * steps - total)
    assert {len(step) for step in taken} == {world_size * micro_batch}


@settings(deadline=None, max_examples=60)
@given(done=st.integers(0, 9), before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 3, 6]), seed=SEEDS)
def test_resuming_anywhere_with_other_ranks_goes_on(done: int, before: int, after: int, seed: int) -> None:
    options = {"total": 100, "global_batch": 12, "seed": seed, "epoch": 1}
    whole = flat(micro_steps(before, micro_batch=12 // before, **options))
    rest = flat(micro_steps(after, micro_batch=12 // after, start=12 * done, **options))
    assert rest == whole[12 * done :]
    assert len(whole) == 108


RANKS = [(world, micro) for world in (1, 2, 3, 4, 6) for micro in (1, 2, 3, 4, 6, 12) if 12 % (world * micro) == 0]


@settings(deadline=None, max_examples=100)
@given(
    total=st.integers(1, 200),
    stops=st.lists(st.tuples(st.sampled_from(RANKS), st.integers(0, 5)), max_size=8),
    last=st.sampled_from(RANKS),
    seed=SEEDS,
)
def test_whatever_stops_and_changes_every_sample_is_seen_once(
    total: int, stops: list[tuple[tuple[int, int], int]], last: tuple[int, int], seed: int
) -> None:
    seen: list[int] = []
    for (world, micro), steps in [*stops, (last, 100)]:
        options = {"total": total, "global_batch": 12, "seed": seed, "epoch": 2, "start": len(seen)}
        seen += flat(micro_steps(world, micro_batch=micro, **options))[: 12 * steps]
    assert sorted(sample for sample in seen if sample != PADDING) == list(range(total))
    assert seen == flat(micro_steps(1, micro_batch=12, total=total, global_batch=12, seed=seed, epoch=2))


def test_the_next_epoch_starts_at_its_beginning() -> None:
    options = {"total": 10, "micro_batch": 2, "global_batch": 4}
    sampler = TrainSampler(**options, epoch=1, start=4)
    sampler.set_epoch(1)
    rest = iter(sampler)
    sampler.set_epoch(2)
    assert flat([batch.tolist() for batch in rest]) == flat(micro_steps(1, **options, epoch=1))[4:]
    assert flat([batch.tolist() for batch in sampler]) == flat(micro_steps(1, **options, epoch=2))
    assert len(sampler) == 6


def test_unshuffled_samples_come_as_they_stand() -> None:
    options = {"total": 10, "micro_batch": 2, "global_batch": 4, "shuffle": False, "epoch": 3}
    assert flat(micro_steps(1, **options)) == [*range(10), PADDING, PADDING]
    assert flat(micro_steps(2, **options, start=4)) == [*range(4, 10), PADDING, PADDING]


class Numbers(Dataset[list[int]]):
    def __getitem__(self, samples: np.ndarray) -> list[int]:
        return samples.tolist()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_keep_the_order(num_workers: int) -> None:
    sampler = TrainSampler(200, micro_batch=3, global_batch=6, start=12)
    loader = DataLoader(Numbers(), batch_size=None, sampler=sampler, num_workers=num_workers, collate_fn=list)
    assert list(loader) == [batch.tolist() for batch in sampler]
    assert len(list(loader)) == 64


def test_blocks_join_without_a_seam() -> None:
    sampler = TrainSampler(40_000, micro_batch=7, global_batch=7)
    taken = flat([batch.tolist() for batch in sampler])
    assert taken == [*shuffled(np.arange(40_000), 40_000, 0, 0).tolist(), *[PADDING] * 5]


@given(total=st.integers(1, 50), micro_batch=st.integers(1, 5), world_size=st.integers(1, 4))
def test_evaluation_covers_every_sample_once(total: int, micro_batch: int, world_size: int) -> None:
    ranks = [
        list(EvalSampler(total, micro_batch=micro_batch, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {-(-total // (micro_batch * world_size))}
    assert {len(batch) for batches in ranks for batch in batches} == {micro_batch}
    taken = np.concatenate([batch for step in zip(*ranks, strict=True) for batch in step])
    assert taken[taken != PADDING].tolist() == list(range(total))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 5}, "is not a multiple of"),
        ({"total": 0}, "holds no sample"),
        ({"start": 3}, "cannot start at sample 3"),
        ({"start": -4}, "cannot start at sample -4"),
        ({"rank": 2}, "impossible ranks"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSampler(**{"total": 10, "micro_batch": 2, "world_size": 2, "global_batch": 4, **options})


def test_a_micro_batch_can_be_asked_for_by_its_number() -> None:
    options = {"total": 21, "micro_batch": 3, "global_batch": 12, "rank": 1, "world_size": 2, "seed": 5, "epoch": 2}
    sampler = TrainSampler(**options, start=6)
    for number, samples in enumerate(sampler, start=1):
        assert sampler.micro_batch(number) == samples[samples != PADDING].tolist()
    assert sampler.micro_batch(3) == [], "the last of them is padding alone"
