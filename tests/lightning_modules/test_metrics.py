import pytest
import torch

from lightning_modules.metrics import HitsByOctave, TokenMean


def counted(*pairs: tuple[float, int]) -> TokenMean:
    metric = TokenMean()
    for loss, tokens in pairs:
        metric.update(torch.tensor(loss), torch.tensor(tokens))
    return metric


def test_every_token_weighs_the_same() -> None:
    assert counted((2.0, 3), (4.0, 1)).compute().item() == (2 * 3 + 4 * 1) / 4


def test_devices_are_added_up_by_tokens() -> None:
    one, other = counted((2.0, 3)), counted((4.0, 1), (7.0, 0))
    one.merge_state(other)
    assert one.compute().item() == 2.5


def test_nothing_counted_is_zero_and_nothing_stays_after_a_reset() -> None:
    metric = counted((3.0, 0))
    assert metric.compute() == 0
    metric.update(torch.tensor(5.0), torch.tensor(2))
    metric.reset()
    metric.update(torch.tensor(1.0), torch.tensor(1))
    assert metric.compute() == 1


def test_a_loss_that_is_no_number_is_not_hidden() -> None:
    assert counted((2.0, 3), (float("nan"), 1)).compute().isnan()


def test_sums_do_not_lose_digits() -> None:
    metric = counted((3.0, 2**40))
    for _ in range(1000):
        metric.update(torch.tensor(4.0), torch.tensor(2**10))
    assert metric.compute().item() == pytest.approx(3 + 1000 * 2**10 / (2**40 + 1000 * 2**10), rel=1e-14)


def hits(*pairs: tuple[int, bool]) -> HitsByOctave:
    metric = HitsByOctave()
    numbers, met = zip(*pairs, strict=True)
    metric.update(torch.tensor(met), torch.tensor(numbers))
    return metric


def test_octaves_end_with_powers_of_two() -> None:
    ends = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 16, 2**31 - 1: 2**31}
    for number, end in ends.items():
        assert hits((number, True), (0, False)).compute() == {end: 1.0}


def test_octaves_of_several_devices_are_added_up() -> None:
    one, other = hits((3, True), (9, False)), hits((4, False), (4, False))
    one.merge_state(other)
    assert {end: x.item() for end, x in one.compute().items()} == {4: pytest.approx(1 / 3), 16: 0.0}
