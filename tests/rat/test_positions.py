"""Logits only where they are wanted."""

import pytest
import torch

from rat import CausalLM, ModelConfig

CONFIG = ModelConfig(
    vocab_size=19, d_model=16, num_layers=2, num_heads=2, pattern=["rat", "attention"], chunk_size=4, max_seq_len=12,
    init_std=0.5,
)  # fmt: skip


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CONFIG)


def test_positions_choose_rows_of_the_logits_in_order(model: CausalLM) -> None:
    ids, documents = torch.randint(19, (3, 11)), torch.randint(2, (3, 11)).cumsum(1)
    positions = torch.rand(3, 11) < 0.4
    positions[1] = False
    for document_ids in (None, documents):
        whole = model(ids, document_ids=document_ids)
        chosen = model(ids, document_ids=document_ids, positions=positions)
        expected = torch.stack([whole[row, t] for row in range(3) for t in range(11) if positions[row, t]])
        torch.testing.assert_close(chosen, expected)
    assert not torch.allclose(model(ids, positions=positions), chosen), "documents make a difference"


def test_no_positions_give_no_logits(model: CausalLM) -> None:
    ids = torch.randint(19, (2, 5))
    assert model(ids, positions=torch.zeros(2, 5, dtype=torch.bool)).shape == (0, 19)
    assert model(ids, positions=torch.ones(2, 5, dtype=torch.bool)).shape == (10, 19)


def test_gradients_reach_every_parameter(model: CausalLM) -> None:
    ids, labels = torch.randint(19, (2, 8)), torch.randint(19, (2, 8))
    labels[:, :3] = -100
    model(ids, labels).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    counted = labels != -100
    torch.nn.functional.cross_entropy(model(ids, positions=counted), labels[counted]).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"labels": torch.zeros(2, 5, dtype=torch.long), "positions": torch.ones(2, 5, dtype=torch.bool)},
            "labels give a loss, positions give logits: pass one of them",
        ),
        ({"positions": torch.ones(2, 4, dtype=torch.bool)}, r"bool like input_ids \(2, 5\), got \(2, 4\) torch.bool"),
        ({"positions": torch.ones(2, 5, dtype=torch.long)}, r"bool like input_ids \(2, 5\), got \(2, 5\) torch.int64"),
    ],
)
def test_positions_that_do_not_fit_are_refused(model: CausalLM, options: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 5, dtype=torch.long), **options)
