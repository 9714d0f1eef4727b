"""A model of the transformers library, seen as evaluation sees ours."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from rat.evaluation.scoring import Request, Score
from rat.generation import Stop


class TransformersScorer:
    """A causal language model with the interface of transformers: whole rows at once, with an attention mask.

    Args:
        model: of AutoModelForCausalLM, on its device, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        # Then it makes logits only at the positions that are asked.
        self.keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def score_batch(self, requests: Sequence[Request]) -> list[Score]:
        """See `Scorer.score_batch`."""
        ids, mask = self._pad([[*context, *continuation[:-1]] for context, continuation in requests])
        first = min(len(context) for context, _ in requests) - 1
        options: dict[str, Any] = {"logits_to_keep": ids.shape[1] - first} if self.keeps_some else {}
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        begin = ids.shape[1] - logits.shape[1]
        scores = []
        for row, (context, continuation) in zip(logits, requests, strict=True):
            start = len(context) - 1 - begin
            own = row[start : start + len(continuation)].float()
            target = torch.tensor(continuation, device=own.device)
            likelihood = own.gather(1, target[:, None]).squeeze(1) - own.logsumexp(1)
            scores.append(Score(float(likelihood.double().sum()), bool((own.argmax(1) == target).all())))
        return scores

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_id: int | None, stop: Stop
    ) -> list[list[int]]:
        """See `Scorer.generate`."""
        backwards, mask = self._pad([list(reversed(prompt)) for prompt in prompts])
        read, ends = backwards.shape[1], dict[int, int]()
        own = self.model.generation_config.eos_token_id
        last = {eos_token_id, *(own if isinstance(own, list) else [own])} - {None}

        def finished(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            for row, token in enumerate(ids[:, -1].tolist()):
                if row not in ends and (token in last or stop(row, token)):
                    ends[row] = ids.shape[1] - read
            return torch.tensor([row in ends for row in range(len(ids))], device=ids.device)

        made = self.model.generate(
            input_ids=backwards.flip(1),
            attention_mask=mask.flip(1),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(last) or None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([finished]),
        )
        return [row[: ends.get(i)] for i, row in enumerate(made[:, read:].tolist())]

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows side by side, padded on the right, and where their own tokens are; (B, T) each."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return ids.to(self.model.device), mask.to(self.model.device)
