"""`CausalLM` as transformers wants a causal language model. The architecture is that of `rat.model`, and no other."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from rat.initialization import initialize_own
from rat.interop.huggingface.cache import RATCache
from rat.interop.huggingface.configuration import RATConfig
from rat.model import IGNORED, CausalLM


class Packing(NamedTuple):
    """Rows in which padding stands anywhere, and the same rows with their own tokens first.

    A recurrence would remember padding before and among the tokens; behind them nobody looks back at it.

    Attributes:
        order: (B, T) where each packed token comes from.
        place: (B, T) for each column the packed token that is the latest there; the first one before it.
        lengths: (B,) how many tokens are a row's own.
    """

    order: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, own: Tensor) -> Self:
        """From (B, T) bool, True at the tokens of a row's own."""
        order = (~own).byte().argsort(dim=1, stable=True)
        return cls(order, (own.cumsum(1) - 1).clamp(min=0), own.sum(1))

    def pack(self, x: Tensor) -> Tensor:
        """(B, T) with each row's own entries first."""
        return x.gather(1, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """(B, T, D) of packed rows, at the columns that they come from; padding gets what the token before it has."""
        return x.gather(1, self.place[..., None].expand(-1, -1, x.shape[-1]))


class RATForCausalLM(PreTrainedModel, GenerationMixin):
    """A `CausalLM` with the interface of transformers: `from_pretrained`, `generate`, `Trainer`.

    Args:
        config: of the model.

    Attributes:
        model: the `CausalLM`.
    """

    config_class = RATConfig
    config: RATConfig
    base_model_prefix = "model"
    # Decoding goes from block to block without their hooks, so that the model stays whole on one device.
    _no_split_modules = ["CausalLM"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    accepts_loss_kwargs = True

    def __init__(self, config: RATConfig) -> None:
        # It names files beside those that the config was read from; where code is saved again, it is named again.
        config.__dict__.pop("auto_map", None)
        super().__init__(config)
        self.model = CausalLM(config.model_config())
        self.post_init()

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")  # type: ignore[untyped-decorator]
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: RATCache | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: (B, T) int64, T >= 1.
            attention_mask: (B, T), 0 where there is padding, on whichever side; or (B, N + T) with the N tokens that
                went before. Padding leaves no trace.
            document_ids: (B, T); tokens of other documents are not seen. Not together with a cache.
            cache: of an earlier call, whose text goes on; it moves on in place.
            labels: (B, T), not shifted: the target of a position is the label of its row's next token; -100 is
                ignored.
            num_items_in_batch: the loss is the sum divided by this; the mean by default.
            use_cache: whether to return a cache where none is given. Default: that of the config, but neither in
                training nor with labels or document_ids.
            logits_to_keep: how many columns from the end, or which ones, logits are wanted at; 0 for all. The loss
                needs none.

        Returns:
            loss (nats a token), logits (B, T, V) and cache.

        Raises:
            ValueError: the mask or the cache does not fit.
        """
        packing = self._packing(input_ids, attention_mask, cache)
        ids = input_ids if packing is None else packing.pack(input_ids)
        if cache is None and self._starts_cache(use_cache, labels, document_ids):
            cache = RATCache()
        if cache is None:
            documents = packing.pack(document_ids) if packing and document_ids is not None else document_ids
            x = self.model.hidden(ids, documents)
        elif document_ids is not None:
            raise ValueError("document_ids go with whole rows, and a cache with texts that go on: pass one of them")
        elif not isinstance(cache, RATCache):
            raise ValueError(f"the cache must be a RATCache, got {type(cache).__name__}: leave it out for a new one")
        else:
            x = cache.read(self.model, ids, packing and packing.lengths, input_ids.shape[1])
        loss = None if labels is None else self._loss(x, labels, packing, num_items_in_batch)
        if packing is not None:
            x = packing.unpack(x)
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(loss=loss, logits=self.model.logits(x[:, columns]), cache=cache)

    def _packing(self, input_ids: Tensor, attention_mask: Tensor | None, cache: RATCache | None) -> Packing | None:
        """None where no token is padding."""
        if attention_mask is None:
            return None
        length = input_ids.shape[-1]
        whole = length + (0 if cache is None else cache.get_seq_length())
        if attention_mask.ndim != 2 or attention_mask.shape[1] not in (length, whole):
            raise ValueError(
                f"attention_mask must be (B, {length}), or (B, {whole}) with what went before,"
                f" got {tuple(attention_mask.shape)}"
            )
        own = attention_mask[:, -length:].bool()
        return None if own.all() else Packing.of(own)

    def _starts_cache(self, use_cache: bool | None, labels: Tensor | None, document_ids: Tensor | None) -> bool:
        if use_cache is not None:
            return use_cache
        return self.config.use_cache and not self.training and labels is None and document_ids is None

    def _loss(
        self, x: Tensor, labels: Tensor, packing: Packing | None, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """The cross-entropy of rows whose own tokens come first, (B, T, D)."""
        if packing is not None:
            beyond = torch.arange(labels.shape[1], device=labels.device) >= packing.lengths[:, None]
            labels = packing.pack(labels).masked_fill(beyond, IGNORED)
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        loss = self.model.loss(x, targets)
        if num_items_in_batch is None:
            return loss
        # the tensor that Trainer gives can be on another device
        return loss * (targets != IGNORED).sum() / torch.as_tensor(num_items_in_batch, device=loss.device)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Put another embedding, of any vocabulary, in the place of embedding and head."""
        self.model.embedding = value
        self.model.config = replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Embedding:
        """The embedding: it is the head."""
        return self.model.embedding

    def set_output_embeddings(self, new_embeddings: nn.Embedding) -> None:
        """As `set_input_embeddings`."""
        self.set_input_embeddings(new_embeddings)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        own = list(module.parameters(recurse=False))
        if own and not any(getattr(weight, "_is_hf_initialized", False) for weight in own):
            initialize_own(module, self.config.init_std)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Let every n-th block of a full pass keep its input alone, or none."""
        self.gradient_checkpointing = enable
        for n, block in enumerate(self.model.layers):
            block.__dict__.pop("forward", None)
            if enable and n % every_n_layers == 0:
                block.forward = partial(gradient_checkpointing_func, block.forward)  # type: ignore[method-assign]

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give generation a cache of ours, with room for all of the text. Raises ValueError if another is asked for."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r} is for attention: leave it out"
            )
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = RATCache(max_cache_length)
            if generation_config.is_assistant:
                model_kwargs["cache"].activate_past_recording()
