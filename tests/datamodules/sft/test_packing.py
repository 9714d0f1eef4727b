from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.sft.packing import pack, padded_lengths, padding

lists = st.integers(1, 8).flatmap(
    lambda chunk: st.integers(1, 12).flatmap(
        lambda chunks: st.tuples(st.lists(st.integers(1, chunk * chunks)), st.just(chunk * chunks), st.just(chunk))
    )
)


@given(lists)
def test_every_document_once_and_no_row_too_long(given: tuple[list[int], int, int]) -> None:
    lengths, seq_len, chunk_size = given
    sizes = padded_lengths(np.array(lengths, dtype=np.int64), chunk_size)
    rows = pack(np.array(lengths, dtype=np.int64), seq_len, chunk_size)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(sizes[row].sum() <= seq_len for row in rows)
    assert all(rows)
    # no worse than one each; and two rows that are half empty would have become one
    assert len(rows) <= len(lengths)
    assert sum(sizes[row].sum() * 2 <= seq_len for row in rows) <= 1
    assert rows == pack(np.array(lengths, dtype=np.int64), seq_len, chunk_size)


def test_by_hand() -> None:
    # padded: 8, 4, 4, 12, 8; the longest first, each into the fullest row with room for it
    assert padded_lengths(np.array([7, 4, 1, 11, 8]), 4).tolist() == [8, 4, 4, 12, 8]
    assert pack(np.array([7, 4, 1, 11, 8]), 16, 4) == [[3, 1], [0, 4], [2]]


def test_padding_by_hand() -> None:
    lengths = np.array([7, 4, 1, 11, 8])  # 31 tokens; alone 5 rows of 16, together 3
    found = padding(lengths, 16, 4)
    assert found == (pytest.approx(49 / 80), pytest.approx(17 / 48), pytest.approx(32 / 49))
    assert str(found) == "61.3% padding in padded rows, 35.4% in packed ones: packing saves 65.3% of it"
    assert padding(np.array([16, 16]), 16, 4) == (0, 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(np.array([3]), 10, 4), "seq_len=10 must be a multiple of chunk_size=4"),
        (lambda: pack(np.array([3, 13]), 12, 4), "document 1 has 13 tokens, a row 12"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_many_documents_take_no_time() -> None:
    lengths = np.random.default_rng(0).integers(1, 4097, size=30_000)
    assert len(pack(lengths, 4096, 1)) * 4096 < 1.01 * lengths.sum()
