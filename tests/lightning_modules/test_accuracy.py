"""Accuracy of tokens and sequences, and prediction, by a model whose answers are known beforehand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_modules import LanguageModel
from lightning_modules.scores import sequence_scores
from rat import ModelConfig

Batch = dict[str, Tensor]
CONFIG = ModelConfig(vocab_size=8, d_model=8, num_layers=1, num_heads=2, num_groups=1, max_seq_len=4)
X = -100


class Data(LightningDataModule):
    """Given batches, for every stage."""

    vocab_size = 8

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader


def trainer() -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip


def echoing(**options: Any) -> LanguageModel:
    """A model that finds its input the likeliest target, whatever stood before."""
    module = LanguageModel(CONFIG, accuracy=True, **options)
    module.configure_model()
    with torch.no_grad():
        for x in module.model.parameters():
            x.zero_()
        module.model.embedding.weight.copy_(torch.eye(8))
        module.model.norm.weight.fill_(1)
    return module


def batch(input_ids: list[list[int]], labels: list[list[int]], documents: list[list[int]] | None = None) -> Batch:
    tensors = {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}
    return tensors if documents is None else tensors | {"document_ids": torch.tensor(documents)}


IDS = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
# three of four, none that counts, both of two; then one of one, and nothing at all
FIRST = batch(IDS, [[1, 2, 7, 4], [X, X, X, X], [X, 2, X, 4]])
SECOND = batch(IDS, [[X, X, X, 4], [X, X, X, X], [X, X, X, X]])
EMPTY = batch(IDS, [[X] * 4] * 3)


def echo_nll(right: int, wrong: int) -> float:
    """Mean nll of `echoing`: logits are what RMSNorm makes of a unit vector, the square root of 8 and zeros."""
    logits = torch.tensor([(1 / 8 + CONFIG.norm_eps) ** -0.5] + [0.0] * 7, dtype=torch.float64)
    nll = -logits.log_softmax(0)
    return ((right * nll[0] + wrong * nll[1]) / (right + wrong)).item()


@pytest.mark.parametrize("stage", ["val", "test"])
def test_targets_and_sequences_that_count_weigh_the_same(stage: str) -> None:
    run = {"val": trainer().validate, "test": trainer().test}[stage]
    (metrics,) = run(echoing(), Data([FIRST, SECOND, EMPTY]), verbose=False)
    assert metrics[f"{stage}/accuracy"] == pytest.approx(6 / 7)
    assert metrics[f"{stage}/sequence_accuracy"] == pytest.approx(2 / 3)
    assert metrics[f"{stage}/loss"] == pytest.approx(echo_nll(6, 1), rel=1e-5)
    assert set(metrics) == {f"{stage}/{name}" for name in ("loss", "perplexity", "accuracy", "sequence_accuracy")}


def test_metrics_start_anew_with_every_validation() -> None:
    module, runner = echoing(), trainer()
    for data, expected in ((Data([FIRST]), 5 / 6), (Data([SECOND]), 1.0), (Data([EMPTY]), 0.0)):
        (metrics,) = runner.validate(module, data, verbose=False)
        assert metrics["val/accuracy"] == pytest.approx(expected)


def test_accuracy_is_told_apart_by_octaves_of_a_number() -> None:
    """Right: 1, 2, 4 of the first row, both of the last, and the one of the second batch. 0 belongs to no octave."""
    first = FIRST | {"distance": torch.tensor([[1, 3, 4, 0], [9, 9, 9, 9], [0, 5, 0, 8]])}
    second = SECOND | {"distance": torch.tensor([[0, 0, 0, 4], [7] * 4, [7] * 4])}
    (metrics,) = trainer().validate(echoing(accuracy_by=["distance"]), Data([first, second]), verbose=False)
    told = {name: value for name, value in metrics.items() if "_by_" in name}
    assert told == {
        "val/accuracy_by_distance/1": 1.0,
        "val/accuracy_by_distance/4": pytest.approx(2 / 3),
        "val/accuracy_by_distance/8": 1.0,
    }
    assert metrics["val/accuracy"] == pytest.approx(6 / 7)


def test_accuracy_by_what_the_batches_do_not_have_is_refused_in_the_first_step() -> None:
    module = echoing(accuracy_by=["distance", "items"])
    module._trainer = trainer()
    with pytest.raises(ValueError, match="accuracy_by names items, but the batches hold input_ids, labels, distance"):
        module.training_step(FIRST | {"distance": FIRST["labels"]}, 0)
    with pytest.raises(ValueError, match="not measured: set accuracy to true"):
        LanguageModel(CONFIG, accuracy_by=["distance"])


def test_without_accuracy_only_the_loss_is_measured() -> None:
    plain = LanguageModel(CONFIG)
    plain.model = echoing().model
    (metrics,) = trainer().validate(plain, Data([FIRST, SECOND]), verbose=False)
    assert set(metrics) == {"val/loss", "val/perplexity"}
    assert metrics["val/loss"] == pytest.approx(echo_nll(6, 1), rel=1e-5)


def test_documents_of_a_row_are_sequences_of_their_own() -> None:
    packed = batch(IDS[:2], [[1, 7, 3, 4], [X, X, 3, X]], [[0, 0, 1, 1], [0, 0, 5, 5]])
    (metrics,) = trainer().validate(echoing(), Data([packed]), verbose=False)
    assert metrics["val/sequence_accuracy"] == pytest.approx(2 / 3)
    (scores,) = trainer().predict(echoing(), Data([packed]))
    assert scores["tokens"].tolist() == [2, 2, 1]
    assert scores["correct"].tolist() == [False, True, True]
    assert scores["nll"].tolist() == pytest.approx([echo_nll(1, 1), echo_nll(2, 0), echo_nll(1, 0)], rel=1e-5)
    assert scores["nll"].dtype == torch.float64


def test_a_document_is_scored_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    module = LanguageModel(CONFIG, accuracy=True)
    module.configure_model()
    for x in module.model.parameters():
        torch.nn.init.normal_(x)
    packed = batch(IDS[:1], [[3, 7, 3, 4]], [[0, 0, 1, 1]])
    (together,) = trainer().predict(module, Data([packed]))
    (alone,) = trainer().predict(module, Data([batch([[1, 2], [3, 4]], [[3, 7], [3, 4]])]))
    torch.testing.assert_close(together["nll"], alone["nll"])


def test_prediction_without_documents_has_every_row() -> None:
    first, empty = trainer().predict(echoing(), Data([FIRST, EMPTY]))
    assert first["tokens"].tolist() == [4, 0, 2]
    assert first["correct"].tolist() == [False, True, True]
    assert first["nll"].tolist() == pytest.approx([echo_nll(3, 1), 0, echo_nll(2, 0)], rel=1e-5)
    assert empty["tokens"].tolist() == empty["nll"].tolist() == [0, 0, 0]
    module = LanguageModel(CONFIG)
    (scores,) = trainer().predict(module, Data([FIRST]))
    assert set(scores) == {"nll", "tokens"}


def test_padding_with_documents_is_no_sequence() -> None:
    (scores,) = trainer().predict(echoing(), Data([EMPTY | {"document_ids": torch.zeros(3, 4, dtype=torch.long)}]))
    assert [len(x) for x in scores.values()] == [0, 0, 0]


def calls(module: LanguageModel, run: Callable[..., Any], data: Data) -> int:
    """Forward passes of the model."""
    count = 0

    def counting(*_: Any) -> None:
        nonlocal count
        count += 1

    with module.model.register_forward_pre_hook(counting):
        run(module, data)
    return count


def test_one_forward_is_enough_for_loss_accuracy_and_prediction() -> None:
    data = Data([FIRST, SECOND])
    assert calls(echoing(), trainer().validate, data) == 2
    assert calls(echoing(), trainer().predict, data) == 2


def test_logits_are_made_only_where_a_target_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: shapes.append((y := linear(x, *rest)).shape) or y)
    trainer().validate(echoing(), Data([FIRST]), verbose=False)
    assert [shape for shape in shapes if shape[-1] == 8 and len(shape) == 2] == [(6, 8)]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_loss_is_that_of_the_model(precision: str) -> None:
    torch.manual_seed(0)
    module = LanguageModel(CONFIG, accuracy=True)
    module.configure_model()
    runner = Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)
    (metrics,) = runner.validate(module, Data([FIRST, SECOND]), verbose=False)
    with torch.no_grad():
        total = sum(module.model(x["input_ids"], x["labels"]) * (x["labels"] != X).sum() for x in (FIRST, SECOND))
    assert metrics["val/loss"] == pytest.approx(total.item() / 7, rel=1e-6 if precision == "32-true" else 1e-2)


def test_devices_weigh_by_what_they_counted() -> None:
    devices = []
    for batches in ([FIRST, EMPTY], [SECOND]):
        module = echoing()
        module._trainer = trainer()
        for x in batches:
            module.validation_step(x, 0)
        devices.append(module)
    for name, expected in (("val/accuracy", 6 / 7), ("val/sequence_accuracy", 2 / 3)):
        one, other = (module.accuracies[name] for module in devices)
        one.merge_state(other)
        assert one.compute().item() == pytest.approx(expected)


def test_metrics_leave_no_trace_in_a_checkpoint() -> None:
    assert {name.split(".")[0] for name in echoing().state_dict()} == {"model"}


def test_scores_count_the_likeliest_token_as_right() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([[1, X, 2], [X, X, 2]])
    scores = sequence_scores(logits, labels)
    expected = F.cross_entropy(logits.double(), torch.tensor([1, 2, 2]), reduction="none")
    torch.testing.assert_close(scores.nll, torch.stack([expected[:2].mean(), expected[2]]), rtol=1e-6, atol=0)
    assert (scores.tokens.tolist(), scores.right.tolist()) == ([2, 1], [1, 1])
    assert scores.hits.tolist() == [True, False, True]
    apart = sequence_scores(logits, labels, torch.tensor([[4, 4, 9], [0, 0, 4]]))
    assert (apart.tokens.tolist(), apart.right.tolist()) == ([1, 1, 1], [1, 0, 1])
