"""`generate` of transformers over our state writes what our own generation writes, token by token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from rat import CausalLM
from rat.interop.huggingface.cache import RATCache
from rat.interop.huggingface.modeling import RATForCausalLM

from .conftest import Batch

Prompts = list[list[int]]


def generated(model: RATForCausalLM, batch: Batch, **options: Any) -> Prompts:
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0} | options
    out = model.generate(batch.ids, attention_mask=batch.mask, **settings)
    return out[:, batch.ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("side", "options"),
    [("left", {}), ("right", {}), ("left", {"use_cache": False}), ("left", {"prefill_chunk_size": 4})],
    ids=str,
)
def test_ragged_prompts_are_continued_as_ours_are(
    model: CausalLM, theirs: RATForCausalLM, prompts: Prompts, side: str, options: dict[str, Any]
) -> None:
    ours = model.generate(prompts, max_new_tokens=10)
    assert generated(theirs, Batch.of(prompts, side), **options) == ours


def test_samples_are_the_same_draws(model: CausalLM, theirs: RATForCausalLM, prompts: Prompts) -> None:
    sampling = {"temperature": 0.7, "top_k": 5}
    ours = model.generate(prompts, max_new_tokens=10, generator=torch.Generator().manual_seed(3), **sampling)
    torch.manual_seed(3)
    assert generated(theirs, Batch.of(prompts), do_sample=True, **sampling) == ours


def test_an_end_of_text_ends_a_row(model: CausalLM, theirs: RATForCausalLM, prompts: Prompts) -> None:
    end = model.generate(prompts, max_new_tokens=10)[1][4]
    ours = model.generate(prompts, max_new_tokens=10, eos_token_id=end)
    rows = generated(theirs, Batch.of(prompts), eos_token_id=end)
    assert [row[: len(own)] for row, own in zip(rows, ours, strict=True)] == ours
    assert all(set(row[len(own) :]) <= {0} for row, own in zip(rows, ours, strict=True))


def test_beams_with_a_state_are_those_without(theirs: RATForCausalLM, prompts: Prompts) -> None:
    batch = Batch.of(prompts)
    beams = generated(theirs, batch, num_beams=4)
    assert beams == generated(theirs, batch, num_beams=4, use_cache=False)
    assert beams != generated(theirs, batch)


def test_several_continuations_of_one_prompt(model: CausalLM, theirs: RATForCausalLM, prompts: Prompts) -> None:
    torch.manual_seed(0)
    rows = generated(theirs, Batch.of(prompts), do_sample=True, num_return_sequences=2)
    thrice = [prompt for prompt in prompts for _ in range(2)]
    ours = model.generate(thrice, max_new_tokens=10, temperature=1.0, generator=torch.Generator().manual_seed(0))
    assert rows == ours


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_on_where_it_was(model: CausalLM, theirs: RATForCausalLM, prompts: Prompts, name: str) -> None:
    ours = model.generate(prompts, max_new_tokens=10)
    batch = Batch.of(prompts)
    options = {"do_sample": False, "pad_token_id": 0}
    first = theirs.generate(
        batch.ids, attention_mask=batch.mask, max_new_tokens=4, return_dict_in_generate=True, **options
    )
    assert isinstance(first.cache, RATCache)
    mask = torch.nn.functional.pad(batch.mask, (0, 4), value=1)
    past = {name: getattr(first, name)}
    rows = theirs.generate(first.sequences, attention_mask=mask, max_new_tokens=6, **past, **options)
    assert rows[:, batch.ids.shape[1] :].tolist() == ours


@pytest.mark.parametrize("helper", ["prompt_lookup_num_tokens", "assistant_model"])
def test_guessed_tokens_change_nothing(
    model: CausalLM, theirs: RATForCausalLM, make_model: Callable[..., CausalLM], prompts: Prompts, helper: str
) -> None:
    """The helper guesses wrong now and then, and the state forgets what it read too much."""
    guess: Any = 3
    if helper == "assistant_model":
        guess = RATForCausalLM(theirs.config).eval()
        guess.load_state_dict({name: x + 0.05 * torch.randn_like(x) for name, x in theirs.state_dict().items()})
        guess.generation_config.num_assistant_tokens_schedule = "constant"
    for prompt in prompts:
        ours = model.generate([prompt], max_new_tokens=10)
        assert generated(theirs, Batch.of([prompt]), pad_token_id=None, **{helper: guess}) == ours


def test_a_text_is_read_piece_by_piece(
    model: CausalLM, theirs: RATForCausalLM, random_ids: Callable[..., Tensor], assert_close: Callable[..., None]
) -> None:
    ids, cache, pieces = random_ids(2, 13), None, []
    for piece in ids.split(5, dim=1):
        out = theirs(piece, cache=cache, use_cache=True)
        cache = out.cache
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, dim=1), model(ids), 1e-5)
    assert cache.get_seq_length() == 13
    assert cache.batch_size == 2


def test_rows_of_a_cache_are_chosen_and_repeated(theirs: RATForCausalLM, random_ids: Callable[..., Tensor]) -> None:
    ids, more = random_ids(3, 6), random_ids(3, 2, seed=1)
    cache = theirs(ids, use_cache=True).cache
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    found = theirs(more[rows], cache=cache).logits
    fresh = theirs(ids, use_cache=True).cache
    torch.testing.assert_close(found, theirs(more, cache=fresh).logits[rows])
    cache.reset()
    torch.testing.assert_close(theirs(ids, cache=cache).logits, theirs(ids, use_cache=True).logits)


def test_a_cache_forgets_what_came_lately_and_no_more(
    theirs: RATForCausalLM, random_ids: Callable[..., Tensor]
) -> None:
    ids, other = random_ids(1, 90), random_ids(1, 3, seed=1)
    cache = theirs(ids[:, :4], use_cache=True).cache
    with pytest.raises(ValueError, match="cannot forget its last 1 tokens"):
        cache.crop(-1)
    cache.activate_past_recording()
    for piece in (ids[:, 4:88], ids[:, 88:89], ids[:, 89:]):
        theirs(piece, cache=cache)
    with pytest.raises(ValueError, match="cannot forget its last 67 tokens"):
        cache.crop(-67)
    text = ids
    for count in (0, 1, 2, 3, 60, 5):
        cache.crop(-count)
        cache.crop(0)
        text = text[:, : text.shape[1] - count]
        assert cache.get_seq_length() == text.shape[1]
        for _ in range(0 if count == 1 else 1 + count):
            text = torch.cat([text, other], dim=1)
            expected = theirs(text, use_cache=False).logits[:, -3:]
            torch.testing.assert_close(theirs(other, cache=cache).logits, expected)


@pytest.mark.parametrize("name", ["rat", "attention", "rnn", "rat_local", "attention_local"])
def test_golden_cases_are_met_through_transformers(
    name: str, golden: Callable[[str], Any], tmp_path: Path, assert_close: Callable[..., None]
) -> None:
    """An independent implementation's logits, loss and continuations, of prompts side by side."""
    case = golden(name)
    theirs = AutoModelForCausalLM.from_pretrained(case.model().save_pretrained(tmp_path))
    ids, labels = case.tensors["input_ids"], case.tensors["labels"]
    assert_close(theirs(ids).logits, case.tensors["logits"])
    one_more, unshifted = F.pad(ids, (0, 1)), F.pad(labels, (1, 0), value=-100)
    assert theirs(one_more, labels=unshifted).loss.item() == pytest.approx(case.tensors["loss"].item(), rel=1e-5)
    facts = case.facts["generate"]
    longest = max(len(fact["continuation"]) for fact in facts)
    rows = generated(theirs, Batch.of([fact["prompt"] for fact in facts]), max_new_tokens=longest)
    for fact, row in zip(facts, rows, strict=True):
        assert row[: len(fact["continuation"])] == fact["continuation"]


def test_another_cache_is_refused(theirs: RATForCausalLM, random_ids: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="cache_implementation 'static' is for attention"):
        theirs.generate(random_ids(1, 4), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="must be a RATCache, got DynamicCache"):
        theirs(random_ids(1, 4), cache=DynamicCache())
