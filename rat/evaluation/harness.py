"""lm-eval (EleutherAI's lm-evaluation-harness) asks, and any `Scorer` answers.

Only this module and `rat.evaluation.tasks` import lm_eval, which the optional extra `eval` brings.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from tqdm import tqdm

from rat.evaluation.scoring import Request, Scorer, score
from rat.evaluation.stopping import StopStrings

LongPrompts = Literal["left", "middle", "refuse"]
# What lm-eval generates where a task does not say how much.
_MAX_NEW_TOKENS = 256


@register_model("rat")
class RatLM(TemplateLM):  # type: ignore[misc]
    """A `Scorer` and its tokenizer as a model of lm-eval.

    A text is preceded by the end-of-text token where nothing else stands before it, which separates the documents of
    training too.

    Args:
        model: scores and generates.
        tokenizer: of the tokenizers library.
        eos_token_id: ends a text.
        batch_size: requests that go through the model side by side.
        max_length: the most tokens that stand before the one predicted. Default: all there are; a recurrence or RAT has
            no longest input. Texts of rolling likelihoods are then read whole, instead of in windows of this length.
        long_prompts: what goes where a prompt and its answer exceed max_length: the prompt's beginning (left), its
            middle, or nothing: it is refused.
        add_special_tokens: whether the tokenizer puts its own special tokens around a text.
    """

    def __init__(
        self,
        model: Scorer,
        tokenizer: Tokenizer,
        eos_token_id: int,
        batch_size: int = 16,
        max_length: int | None = None,
        long_prompts: LongPrompts = "left",
        add_special_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.vocabulary, self.end = model, tokenizer, eos_token_id
        self.batch_size, self.max_length, self.long_prompts = batch_size, max_length, long_prompts
        self.add_special_tokens = add_special_tokens

    @property
    def eot_token_id(self) -> int:
        """What ends a text, and stands before one that has no context."""
        return self.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text."""
        special = self.add_special_tokens if add_special_tokens is None else add_special_tokens
        return self.vocabulary.encode(string, add_special_tokens=special).ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [
            Request(self._shortened(context, len(continuation) - 1), continuation)
            for _, context, continuation in requests
        ]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        for i, found in self._scores(asked, "log-likelihoods", disable_tqdm):
            answers[i] = tuple(found)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each token predicted from all before it, or from max_length of them."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(self.tok_encode(text)) for text in texts]
        owners = [i for i, own in enumerate(windows) for _ in own]
        totals, left = [0.0] * len(texts), [len(own) for own in windows]
        flat = [window for own in windows for window in own]
        for place, found in self._scores(flat, "rolling log-likelihoods", disable_tqdm):
            i = owners[place]
            totals[i] += found.log_likelihood
            left[i] -= 1
            if not left[i]:
                self.cache_hook.add_partial("loglikelihood_rolling", (texts[i],), totals[i])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to and without the first stop string."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generations", disable=disable_tqdm) as bar:
            for settings, members in groups.items():
                options = normalize_gen_kwargs(json.loads(settings), _MAX_NEW_TOKENS)
                if options["do_sample"]:
                    raise ValueError(f"the task wants sampled answers ({settings}); evaluation generates greedily")
                length = options["max_gen_toks"]
                prompts = {i: self._prompt(requests[i].args[0], length) for i in members}
                ordered = sorted(members, key=lambda i: -len(prompts[i]))
                for start in range(0, len(ordered), self.batch_size):
                    batch = ordered[start : start + self.batch_size]
                    for i, text in zip(batch, self._written([prompts[i] for i in batch], options), strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return texts

    def _written(self, prompts: Sequence[list[int]], options: Any) -> list[str]:
        stop = StopStrings(self.vocabulary, options["until"])
        rows = self.model.generate(prompts, options["max_gen_toks"], self.end, stop)
        return [stop.text(row[:-1] if row and row[-1] == self.end else row) for row in rows]

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        tokens = self.tok_encode(text) or [self.end]
        if max(tokens) >= self.model.vocab_size:
            raise ValueError(f"a prompt holds token {max(tokens)}, the vocabulary has 0 to {self.model.vocab_size - 1}")
        return self._shortened(tokens, new_tokens)

    def _shortened(self, context: list[int], following: int) -> list[int]:
        """A context that leaves room in max_length for so many tokens of its continuation."""
        if self.max_length is None or len(context) + following <= self.max_length:
            return context
        room = self.max_length - following
        if self.long_prompts == "refuse" or room < 1:
            raise ValueError(
                f"a prompt of {len(context)} tokens and {following} of its answer exceed max_length {self.max_length}:"
                " raise it, or let --long_prompts left or middle cut the prompt"
            )
        head = room // 2 if self.long_prompts == "middle" else 0
        return context[:head] + context[head - room :]

    def _windows(self, tokens: list[int]) -> list[Request]:
        if self.max_length is None:
            return [Request([self.end], tokens)] if tokens else []
        windows = get_rolling_token_windows(tokens, self.end, self.max_length, 1)
        return [Request(*make_disjoint_window(window)) for window in windows]

    def _scores(self, requests: list[Request], what: str, quiet: bool) -> Any:
        with tqdm(total=len(requests), desc=what, disable=quiet) as bar:
            for place, found in score(self.model, requests, self.batch_size):
                yield place, found
                bar.update()
