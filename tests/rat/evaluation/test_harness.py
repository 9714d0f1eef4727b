"""The adapter for lm-eval: what it hands to the model, and that it answers as lm-eval's own adapter does."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import get_model
from tokenizers import Tokenizer

from datamodules.tokenizer import end_of_text_id, train_tokenizer
from rat import CausalLM
from rat.evaluation.harness import RatLM
from rat.evaluation.scoring import RatScorer, Request
from rat.evaluation.transformers_scorer import TransformersScorer

TEXTS = [
    "the first of several words of a text that is longer than the others, and goes on for a while",
    "one",
    "two or three words",
    "a text of middling length, no more",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, 300)


@pytest.fixture
def model(make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model("rat", "sliding_window", vocab_size=300).eval()


@pytest.fixture
def lm(model: CausalLM, tokenizer: Tokenizer) -> Callable[..., RatLM]:
    def make(**options: Any) -> RatLM:
        return RatLM(RatScorer(model), tokenizer, end_of_text_id(tokenizer), **{"batch_size": 3} | options)

    return make


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


@torch.no_grad()
def likelihood(model: CausalLM, context: Sequence[int], continuation: Sequence[int]) -> float:
    logits = model(torch.tensor([[*context, *continuation]]))[0, len(context) - 1 : -1].log_softmax(-1)
    return float(logits.gather(1, torch.tensor(continuation)[:, None]).sum())


def test_contexts_and_continuations_are_those_of_lm_eval(
    lm: Callable[..., RatLM], model: CausalLM, tokenizer: Tokenizer
) -> None:
    pairs = [(a, " " + b) for a in TEXTS for b in TEXTS] + [("", TEXTS[2]), ("two ", "or")]
    answers = lm().loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (found, _) in zip(pairs, answers, strict=True):
        before = tokenizer.encode(context.rstrip()).ids
        whole = tokenizer.encode(context + continuation).ids
        expected = likelihood(model, before or [end_of_text_id(tokenizer)], whole[len(before) :])
        assert found == pytest.approx(expected, rel=1e-5)


def test_rolling_likelihoods_see_the_whole_past_or_windows_of_it(
    lm: Callable[..., RatLM], model: CausalLM, tokenizer: Tokenizer
) -> None:
    end, rows = end_of_text_id(tokenizer), [tokenizer.encode(text).ids for text in TEXTS]
    requests = ask("loglikelihood_rolling", *[(text,) for text in [*TEXTS, ""]])
    whole = lm().loglikelihood_rolling(requests, disable_tqdm=True)
    assert whole[:4] == pytest.approx([likelihood(model, [end], row) for row in rows], rel=1e-5)
    assert whole[4] == 0
    windows = lm(max_length=6).loglikelihood_rolling(requests, disable_tqdm=True)
    for found, row in zip(windows, rows, strict=False):
        expected, text = 0.0, [end, *row]
        for start in range(0, len(row), 6):
            stop = min(start + 6, len(row))
            # Each token once; the last window reaches back as far as the others.
            first = max(0, stop - 6)
            expected += likelihood(model, text[first : start + 1], text[start + 1 : stop + 1])
        assert found == pytest.approx(expected, rel=1e-5)


def test_generations_stop_at_strings_and_do_not_mix(
    lm: Callable[..., RatLM], model: CausalLM, tokenizer: Tokenizer
) -> None:
    free = [tokenizer.decode(model.generate([tokenizer.encode(text).ids], max_new_tokens=20)[0]) for text in TEXTS]
    stop = free[0][9:11]
    settings = [{"until": [stop], "max_gen_toks": 20}, {"until": [], "max_gen_toks": 4, "do_sample": False}]
    answers = lm().generate_until(
        ask("generate_until", *[(text, chosen) for text in TEXTS for chosen in settings]), disable_tqdm=True
    )
    assert answers[::2] == [text.split(stop)[0] for text in free]
    assert all(text.startswith(answer) and answer for text, answer in zip(free, answers[1::2], strict=True))
    with pytest.raises(ValueError, match="evaluation generates greedily"):
        lm().generate_until(ask("generate_until", ("one", {"do_sample": True, "temperature": 1.0})))


def test_the_end_of_text_ends_a_generation_and_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    end = end_of_text_id(tokenizer)

    class Writer:
        vocab_size = 300

        def generate(self, prompts: list[list[int]], *_: Any) -> list[list[int]]:
            return [[*tokenizer.encode(" two").ids, end] for _ in prompts]

    lm = RatLM(Writer(), tokenizer, end)  # type: ignore[arg-type]
    assert lm.generate_until(ask("generate_until", ("one", {}), ("", {})), disable_tqdm=True) == [" two", " two"]


def test_long_prompts_lose_their_beginning_or_middle_or_are_refused(lm: Callable[..., RatLM]) -> None:
    tokens = list(range(20))
    assert lm()._shortened(tokens, 99) == tokens
    assert lm(max_length=25)._shortened(tokens, 5) == tokens
    assert lm(max_length=12)._shortened(tokens, 5) == tokens[13:]
    assert lm(max_length=12, long_prompts="middle")._shortened(tokens, 5) == [0, 1, 2, 16, 17, 18, 19]
    assert lm(max_length=6, long_prompts="middle")._shortened(tokens, 5) == [19]
    for options in ({"long_prompts": "refuse", "max_length": 24}, {"max_length": 5}):
        with pytest.raises(ValueError, match=r"a prompt of 20 tokens and 5 of its answer exceed max_length"):
            lm(**options)._shortened(tokens, 5)


def test_contexts_are_cut_to_what_max_length_lets_stand_before_the_last_token(
    lm: Callable[..., RatLM], model: CausalLM, tokenizer: Tokenizer
) -> None:
    context, continuation = tokenizer.encode(TEXTS[0]).ids, tokenizer.encode(" two").ids
    assert len(continuation) < 6 < len(context)
    ((found, _),) = lm(max_length=6).loglikelihood(ask("loglikelihood", (TEXTS[0], " two")), disable_tqdm=True)
    expected = likelihood(model, context[len(continuation) - 1 - 6 :], continuation)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_prompt_of_another_tokenizer_is_refused(make_model: Callable[..., CausalLM], tokenizer: Tokenizer) -> None:
    lm = RatLM(RatScorer(make_model("rat", vocab_size=100)), tokenizer, 0)
    with pytest.raises(ValueError, match="the vocabulary has 0 to 99"):
        lm.generate_until(ask("generate_until", (TEXTS[0], {})), disable_tqdm=True)


def test_answers_are_cached_as_they_come(lm: Callable[..., RatLM]) -> None:
    asked: list[tuple[str, tuple[Any, ...]]] = []

    class Hook(CacheHook):
        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            asked.append((attr, tuple(req)))

    own = lm()
    own.set_cache_hook(Hook(None))
    pairs, texts = [(TEXTS[0], " two"), ("one", " two")], [(TEXTS[2],)]
    own.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    own.loglikelihood_rolling(ask("loglikelihood_rolling", *texts), disable_tqdm=True)
    own.generate_until(ask("generate_until", ("one", {"max_gen_toks": 1})), disable_tqdm=True)
    assert sorted(asked[:2]) == sorted(("loglikelihood", pair) for pair in pairs)
    assert asked[2:] == [("loglikelihood_rolling", texts[0]), ("generate_until", ("one", {"max_gen_toks": 1}))]


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    others = {"vocab_size": 300, "max_position_embeddings": 128, "initializer_range": 0.3, "eos_token_id": 0}
    config = transformers.LlamaConfig(**sizes, **others)
    return transformers.LlamaForCausalLM(config).eval()


def test_a_transformers_model_answers_as_under_lm_evals_own_adapter(llama: Any, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    theirs = get_model("hf")(pretrained=llama, tokenizer=fast, batch_size=4, device="cpu")
    ours = RatLM(TransformersScorer(llama), tokenizer, theirs.eot_token_id, 4, add_special_tokens=True)
    draw = random.Random(0)
    words = " ".join(TEXTS).split()

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    pairs = ask("loglikelihood", *[(text(30), " " + text(6)) for _ in range(20)], ("", "two words"))
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    for (found, greedy), (wanted, wanted_greedy) in zip(ours.loglikelihood(pairs, True), expected, strict=True):
        assert math.isclose(found, wanted, rel_tol=1e-5)
        assert greedy == wanted_greedy
    prompts = ask("generate_until", *[(text(12), {"until": ["o"], "max_gen_toks": 12}) for _ in range(6)])
    assert ours.generate_until(prompts, True) == theirs.generate_until(prompts, True)


def test_a_transformers_model_that_keeps_all_logits_answers_the_same(llama: Any) -> None:
    requests = [Request([5, 6, 7], [8, 9]), Request([1], [2, 3, 4, 5, 6])]
    scorer = TransformersScorer(llama)
    expected = scorer.score_batch(requests)
    scorer.keeps_some = False
    assert [x.log_likelihood for x in scorer.score_batch(requests)] == pytest.approx(
        [x.log_likelihood for x in expected]
    )
