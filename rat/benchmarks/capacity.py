"""The largest batch that fits: a search that trusts only what was measured."""

from collections.abc import Callable
from typing import NamedTuple

# Found to this share of itself: a closer one would cost more trials than it is worth.
PRECISION = 0.02


class Capacity(NamedTuple):
    """A batch that fits, and what it was seen to take."""

    batch_size: int
    peak_bytes: int


def largest_batch(peak_of: Callable[[int], int | None], budget: int, row_bytes: int) -> Capacity:
    """The largest number of rows whose measured peak stays within the budget, to 2 % of itself or one row.

    Counting tells about how many: what one row was seen to take, and `row_bytes` for each further one. A quarter of
    them is tried first, since rows may take several times what is counted; after that, what the line through the
    latest trial leads to. Where that is nothing new, a small step is made beyond what fits, or, if it was memory
    that ran out, half the way to there.

    Args:
        peak_of: measures the bytes that a batch takes at most; None where it ran out of memory.
        budget: bytes.
        row_bytes: what a row takes at least.

    Raises:
        ValueError: not even one row fits.
    """
    first = peak_of(1)
    if first is None or first > budget:
        needed = "more than there is" if first is None else f"{first / 1e9:.3f} GB"
        raise ValueError(f"one row needs {needed}, the budget is {budget / 1e9:.3f} GB: raise --memory_gb")
    fits, too_many, blind = Capacity(1, first), None, False
    guess = 1 + (budget - first) // row_bytes // 4
    while True:
        beyond = fits.batch_size + max(1, int(PRECISION * fits.batch_size))
        if too_many is not None and beyond >= too_many:
            return fits
        if guess <= fits.batch_size or (too_many is not None and guess >= too_many):
            guess = (fits.batch_size + too_many) // 2 if blind and too_many else beyond
        peak = peak_of(guess)
        if peak is not None and peak <= budget:
            fits = Capacity(guess, peak)
        else:
            too_many, blind = guess, peak is None
        if peak is not None:
            guess = 1 + int((budget - first) * (guess - 1) / max(1, peak - first))
