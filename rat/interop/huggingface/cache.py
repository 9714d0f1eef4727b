"""What generation remembers of a text, as transformers passes it around."""

import torch
from torch import Tensor
from transformers import Cache

from rat.layers import LayerState
from rat.model import CausalLM

# Tokens at the end of a text that can be forgotten: more than anybody guesses at a time.
_KEPT = 64


class RATCache(Cache):
    """The decoding state of a `CausalLM`, in the place of a cache of keys and values.

    Args:
        room: tokens a row to reserve memory for; it grows where there come more.

    Attributes:
        state: a part for each layer; None before the first token.
    """

    def __init__(self, room: int = 0) -> None:
        super().__init__(layers=[])
        self.room = room
        self.state: list[LayerState] | None = None
        self._columns = 0
        self._records = False
        # The last tokens (B, n); the state has not read the last `_unread` of them, which `crop` took it back before.
        self._recent: Tensor | None = None
        self._unread = 0
        # Copies of the state, each after so many of the recent tokens; the first is from before all of them.
        self._marks: list[tuple[int, list[LayerState]]] = []

    def read(self, model: CausalLM, input_ids: Tensor, lengths: Tensor | None, columns: int) -> Tensor:
        """Let the state read further tokens.

        Args:
            model: whose state it is.
            input_ids: (B, T), each row's own tokens first.
            lengths: (B,) how many of the T are a row's own; None for all.
            columns: by how many the caller's rows, padding included, get longer.

        Returns:
            (B, T, D) of `CausalLM.advance`.

        Raises:
            ValueError: the cache holds another number of rows.
        """
        if self.state is None:
            self.state = model.new_state(len(input_ids), max(self.room, input_ids.shape[1]))
        unread, self._unread = self._unread, 0
        if unread and self._recent is not None:
            input_ids = torch.cat([self._recent[:, -unread:], input_ids], dim=1)
            lengths = None if lengths is None else lengths + unread
            self._recent = self._recent[:, :-unread]
        parts = []
        if self._records and lengths is None:
            # A prompt is not read twice because of a few tokens behind it.
            early = max(0, input_ids.shape[1] - _KEPT)
            if early:
                parts.append(model.advance(input_ids[:, :early], self.state))
                self._recent, self._marks = None, []
                input_ids = input_ids[:, early:]
            self._record(input_ids)
        else:
            self._recent, self._marks = None, []
        parts.append(model.advance(input_ids, self.state, lengths))
        self._columns += columns
        return torch.cat(parts, dim=1)[:, unread:]

    def _record(self, input_ids: Tensor) -> None:
        """Remember tokens that are about to be read, and now and then the state before them."""
        assert self.state is not None
        before = 0 if self._recent is None else self._recent.shape[1]
        self._recent = input_ids if self._recent is None else torch.cat([self._recent, input_ids], dim=1)
        if not self._marks or before - self._marks[-1][0] >= _KEPT:
            self._marks.append((before, _copy(self.state)))
        if len(self._marks) > 2:
            start = self._marks[1][0]
            self._recent = self._recent[:, start:]
            self._marks = [(place - start, state) for place, state in self._marks[1:]]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number; a recurrence reads some of those before them again.

        Raises:
            ValueError: they are more than 64, came with padding, or came before `activate_past_recording`.
        """
        count, known = abs(tokens_to_remove), 0 if self._recent is None else self._recent.shape[1]
        if count > known or self._recent is None:
            if not count:
                return
            raise ValueError(
                f"this cache cannot forget its last {count} tokens: call activate_past_recording() before they come,"
                f" bring them without padding, and forget {_KEPT} at most"
            )
        self._recent, self._columns = self._recent[:, : known - count], self._columns - count
        if count <= self._unread:
            self._unread -= count
            return
        while self._marks[-1][0] > known - count:
            self._marks.pop()
        place, self.state = self._marks.pop()
        self._unread = known - count - place

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs: up to two copies of the state."""
        self._records = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How long the caller's rows were so far, padding included."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes so many, side by side."""
        if self.state is not None:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = [part.select(rows.to(part.lengths.device)) for part in self.state]
        if self._recent is not None:
            unread = self._recent[:, self._recent.shape[1] - self._unread :]
            self._recent = unread[rows.to(unread.device)]
        self._marks = []

    def reset(self) -> None:
        """Forget everything."""
        self.state = self._recent = None
        self._columns = self._unread = 0
        self._marks = []

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    @property
    def batch_size(self) -> int:
        """B, or -1 before the first token."""
        return -1 if self.state is None else len(self.state[0].lengths)

    @property
    def is_initialized(self) -> bool:
        """Whether there is a state."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """True: see `crop`."""
        return True

    @property
    def is_compileable(self) -> bool:
        """False: the state grows."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """Of no layer, as far as masks are concerned: there are none."""
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """False, which tells generation that the length of the text is known."""
        return [False]


def _copy(state: list[LayerState]) -> list[LayerState]:
    return [part.select(torch.arange(len(part.lengths), device=part.lengths.device)) for part in state]
