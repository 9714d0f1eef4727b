"""Our model in the conventions of transformers: weights, padding, losses, training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from rat import CausalLM
from rat.config import ModelConfig
from rat.interop.huggingface.configuration import RATConfig
from rat.interop.huggingface.modeling import RATForCausalLM

from .conftest import Batch

Prompts = list[list[int]]


def nll(model: CausalLM, prompts: Prompts) -> tuple[Tensor, int]:
    """The summed loss of texts read one by one, and over how many tokens."""
    total = torch.zeros(())
    for prompt in prompts:
        logits = model(torch.tensor([prompt]))[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(prompt[1:]), reduction="sum")
    return total, sum(map(len, prompts)) - len(prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_config_come_back_bit_for_bit(
    make_model: Callable[..., CausalLM], tmp_path: Path, dtype: torch.dtype, assert_same_weights: Callable[..., None]
) -> None:
    model = make_model("rat", "rnn", rope_base=None, num_groups=4).to(dtype)
    theirs = AutoModelForCausalLM.from_pretrained(model.save_pretrained(tmp_path / "ours"))
    assert theirs.dtype == dtype
    assert_same_weights(theirs.model, model)
    assert theirs.config.model_config() == theirs.model.config == model.config
    theirs.save_pretrained(tmp_path / "theirs")
    again = CausalLM.from_pretrained(tmp_path / "theirs", model.config)
    assert_same_weights(again, model)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").model, model)


def test_weights_cut_in_pieces_come_back(
    make_model: Callable[..., CausalLM], tmp_path: Path, assert_same_weights: Callable[..., None]
) -> None:
    model = make_model("rat")
    theirs = AutoModelForCausalLM.from_pretrained(model.save_pretrained(tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    pieces = sorted((tmp_path / "theirs").glob("model-*.safetensors"))
    assert len(pieces) > 1
    assert_same_weights(CausalLM.from_pretrained(tmp_path / "theirs"), model)
    pieces[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{pieces[1].name} is missing"):
        CausalLM.from_pretrained(tmp_path / "theirs")


def test_every_number_of_the_model_is_in_its_file(theirs: RATForCausalLM) -> None:
    assert not list(theirs.buffers())
    assert theirs.get_output_embeddings() is theirs.get_input_embeddings() is theirs.model.embedding
    assert len(theirs.state_dict()) == len(theirs.model.state_dict())


def test_dtype_and_device_are_chosen_at_loading(model: CausalLM, folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto")
    assert {weight.dtype for weight in theirs.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(theirs.model.state_dict(), model.to(torch.bfloat16).state_dict(), rtol=0, atol=0)


def test_weights_that_are_missing_start_as_ours_do(folder: Path, model: CausalLM) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    lost = ["layers.1.mixer.in_proj.weight", "layers.0.mixer.gate_bias", "norm.weight"]
    lost = [name for name in lost if weights.pop(name, None) is not None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for name, x in theirs.model.state_dict().items():
        assert x.isfinite().all()
        assert torch.equal(x, model.state_dict()[name]) == (name not in lost)
    assert (theirs.model.norm.weight == 1).all()
    assert theirs.model.layers[1].mixer.in_proj.weight.std() < 0.03


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"pattern": ["other"]}, {"chunk_size": 0}])
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        RATConfig(**{"d_model": 64, "num_heads": 4} | change)


def test_a_config_of_another_kind_is_no_model_of_ours(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a llama"):
        ModelConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_leaves_no_trace(
    model: CausalLM, theirs: RATForCausalLM, prompts: Prompts, side: str, use_cache: bool,
    assert_close: Callable[..., None],
) -> None:  # fmt: skip
    batch = Batch.of(prompts, "right" if side == "right" else "left")
    if side == "middle":
        order = torch.tensor([10, 0, 1, 9, 2, 3, 4, 8, 5, 6, 7]).argsort()
        batch = Batch(batch.ids[:, order], batch.mask[:, order])
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*batch, strict=True)]
    out = theirs(batch.ids, attention_mask=batch.mask, use_cache=use_cache)
    for row, mask, prompt in zip(out.logits, batch.mask, prompts, strict=True):
        assert_close(row[mask.bool()], model(torch.tensor([prompt]))[0], 1e-5)
    last = theirs(batch.ids, attention_mask=batch.mask, use_cache=use_cache, logits_to_keep=1).logits
    assert_close(last, out.logits[:, -1:], 1e-6)
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    total, count = nll(model, prompts)
    found = theirs(batch.ids, attention_mask=batch.mask, labels=labels, use_cache=use_cache, num_items_in_batch=100)
    torch.testing.assert_close(found.loss, total / 100)
    # whatever the labels of the padding are
    found = theirs(batch.ids, attention_mask=batch.mask, labels=batch.ids, use_cache=use_cache)
    torch.testing.assert_close(found.loss, total / count)
    assert (found.cache is not None) == use_cache


def test_packed_documents_do_not_see_each_other(
    model: CausalLM, theirs: RATForCausalLM, prompts: Prompts, assert_close: Callable[..., None]
) -> None:
    ids = torch.tensor([[token for prompt in prompts for token in prompt]])
    documents = torch.tensor([[n for n, prompt in enumerate(prompts) for _ in prompt]])
    expected = torch.cat([model(torch.tensor([prompt]))[0] for prompt in prompts])
    assert_close(theirs(ids, document_ids=documents).logits[0], expected, 1e-5)
    padded, mask = F.pad(ids, (2, 0)), F.pad(torch.ones_like(ids), (2, 0))
    found = theirs(padded, attention_mask=mask, document_ids=F.pad(documents, (2, 0), value=7)).logits
    assert_close(found[0, 2:], expected, 1e-5)
    with pytest.raises(ValueError, match="document_ids go with whole rows"):
        theirs(ids, document_ids=documents, use_cache=True)


def test_a_mask_that_does_not_fit_is_refused(theirs: RATForCausalLM, random_ids: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, 5\), or \(B, 5\) with what went before"):
        theirs(random_ids(2, 5), attention_mask=torch.ones(2, 6))


def test_outputs_are_tuples_where_that_is_asked(theirs: RATForCausalLM, random_ids: Callable[..., Tensor]) -> None:
    ids = random_ids(2, 5)
    loss, logits = theirs(ids, labels=ids, return_dict=False)
    assert loss.shape == ()
    assert logits.shape == (2, 5, 40)


def test_activation_checkpointing_changes_no_gradient(
    theirs: RATForCausalLM, random_ids: Callable[..., Tensor]
) -> None:
    ids = random_ids(2, 9)
    theirs.train()

    def gradients() -> tuple[dict[str, Tensor | None], int]:
        passes = []
        for block in theirs.model.layers:
            block.mixer.register_forward_pre_hook(lambda *_: passes.append(1))
        theirs(ids, labels=ids).loss.backward()
        found = {name: weight.grad for name, weight in theirs.named_parameters()}
        theirs.zero_grad()
        for block in theirs.model.layers:
            block.mixer._forward_pre_hooks.clear()
        return found, len(passes)

    expected, passes = gradients()
    theirs.gradient_checkpointing_enable()
    assert theirs.is_gradient_checkpointing
    found, more = gradients()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (passes, more) == (2, 4)
    theirs.gradient_checkpointing_disable()
    assert gradients()[1] == 2


def test_trainer_trains_as_if_rows_were_not_padded(
    model: CausalLM, theirs: RATForCausalLM, prompts: Prompts, tmp_path: Path
) -> None:
    """Two micro batches, and the loss is the mean over the tokens of both."""
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        for ids, mask in zip(*Batch.of([*prompts, prompts[0]], "right"), strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        learning_rate=0.1, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant", use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(theirs, arguments, train_dataset=rows)
    trainer.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total, count = nll(model, [*prompts, prompts[0]])
    (total / count).backward()
    optimizer.step()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(total) / count, abs=1e-4)
    for (name, found), expected in zip(theirs.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_the_vocabulary_grows(theirs: RATForCausalLM, random_ids: Callable[..., Tensor], tmp_path: Path) -> None:
    theirs.resize_token_embeddings(48)
    assert theirs(random_ids(1, 3)).logits.shape == (1, 3, 48)
    theirs.save_pretrained(tmp_path / "grown")
    assert CausalLM.from_pretrained(tmp_path / "grown").config == theirs.model.config
    assert theirs.config.vocab_size == theirs.model.config.vocab_size == 48
