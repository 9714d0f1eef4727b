from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rat.ops.documents import check_documents, document_starts, positions, start_indices

IDS = torch.tensor([[5, 5, 2, 2, 2, 5], [0, 1, 2, 2, 3, 3]])
CPU = torch.device("cpu")


def test_a_document_is_a_run_of_equal_ids_even_when_an_id_comes_back() -> None:
    assert document_starts(IDS).int().tolist() == [[1, 0, 1, 0, 0, 1], [1, 1, 1, 0, 1, 0]]
    assert start_indices(IDS).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 2, 4, 4]]


def test_positions_count_from_each_documents_first_token() -> None:
    assert positions(2, 6, IDS, None, CPU).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]
    assert positions(2, 3, None, None, CPU).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_an_offset_moves_only_the_first_document_of_its_row() -> None:
    offset = torch.tensor([10, 20])
    assert positions(2, 6, IDS, offset, CPU).tolist() == [[10, 11, 0, 1, 2, 0], [20, 0, 0, 1, 0, 1]]
    assert positions(2, 3, None, offset, CPU).tolist() == [[10, 11, 12], [20, 21, 22]]


@pytest.mark.parametrize("seed", range(4))
def test_positions_agree_with_counting_one_by_one(seed: int, ragged_ids: Callable[..., Tensor]) -> None:
    ids, offset = ragged_ids(seed, 3, 29, 4), torch.tensor([0, 7, 100])
    for row, start, place in zip(ids.tolist(), offset.tolist(), positions(3, 29, ids, offset, CPU), strict=True):
        count, expected = start - 1, []
        for t, document in enumerate(row):
            count = count + 1 if t == 0 or document == row[t - 1] else 0
            expected.append(count)
        assert place.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_one_token_is_one_document_in_any_integer_type(dtype: torch.dtype) -> None:
    ids = torch.tensor([[3]], dtype=dtype)
    check_documents(ids, 1, 1)
    assert document_starts(ids).tolist() == [[True]]
    assert positions(1, 1, ids, torch.tensor([4]), CPU).tolist() == [[4]]


def test_ids_may_be_absent() -> None:
    check_documents(None, 2, 6)


@pytest.mark.parametrize("ids", [IDS[:1], IDS[:, :5], IDS[0], IDS.float()])
def test_ids_of_the_wrong_shape_or_type_are_named(ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^document_ids must be integers of shape \(2, 6\), got"):
        check_documents(ids, 2, 6)
