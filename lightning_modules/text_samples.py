"""Texts that a model writes while it is trained."""

import textwrap
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from tokenizers import Tokenizer

from lightning_modules.dashboard import preformatted, writers
from lightning_modules.language_model import LanguageModel
from lightning_modules.sharding import shards_weights
from rat.generation import Sampling

# Characters of a line; TensorBoard would let longer ones leave the page.
WIDTH = 100


class TextSamples(Callback):
    """Continues prompts at every validation of a fit, as samples/prompt_N among TensorBoard's texts.

    Training does not notice: tokens are drawn from a generator of their own, which starts from `seed` each time, so
    that texts differ by the weights alone. Rank 0 writes them while the others wait. Where devices share the weights
    nothing is written, and a warning says so; as where the data know no tokenizer.

    Args:
        prompts: what is continued.
        max_new_tokens: at most so many tokens for each; a text ends where a document does.
        temperature: logits are divided by it; 0 takes the likeliest token.
        seed: of the draws.

    Raises:
        ValueError: no prompt or an empty one, or a number out of range.
    """

    def __init__(
        self, prompts: Sequence[str], max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> None:
        if isinstance(prompts, str) or not prompts or not all(prompts):
            raise ValueError(f"prompts must be a list of texts, none of them empty, got {prompts!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        Sampling(temperature=temperature)
        self.prompts, self.max_new_tokens, self.temperature, self.seed = prompts, max_new_tokens, temperature, seed
        self._vocabulary: Tokenizer | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModel) -> None:
        """Read the data's tokenizer, or say why there will be no texts."""
        file = getattr(trainer.datamodule, "tokenizer_file", None)
        if shards_weights(trainer.strategy):
            rank_zero_warn(
                "TextSamples writes nothing where devices share the weights: cli.py generate continues texts with the"
                " model that ExportModel leaves"
            )
        elif file is None:
            rank_zero_warn("TextSamples writes nothing: the data know no tokenizer")
        elif writers(trainer):
            self._vocabulary = Tokenizer.from_file(str(file))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LanguageModel) -> None:
        """Write the texts, within what counts as time of validation."""
        if self._vocabulary is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        for i, text in enumerate(self._texts(trainer, pl_module, self._vocabulary)):
            for writer in writers(trainer):
                writer.add_text(f"samples/prompt_{i}", preformatted(_wrapped(text)), trainer.global_step)

    def _texts(self, trainer: Trainer, pl_module: LanguageModel, vocabulary: Tokenizer) -> list[str]:
        assert pl_module.model is not None
        prompts = [vocabulary.encode(prompt, add_special_tokens=False).ids for prompt in self.prompts]
        with trainer.precision_plugin.forward_context():
            continued = pl_module.model.generate(
                prompts,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                eos_token_id=trainer.datamodule.eos_id,
                generator=torch.Generator(pl_module.device).manual_seed(self.seed),
            )
        return [vocabulary.decode(ids + tokens) for ids, tokens in zip(prompts, continued, strict=True)]


def _wrapped(text: str) -> str:
    lines = (textwrap.wrap(line, WIDTH, drop_whitespace=False) or [""] for line in text.splitlines())
    return "\n".join(part for parts in lines for part in parts)
