"""What a layer remembers of the tokens it has decoded, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(kw_only=True)
class LayerState:
    """The memory of one layer. Every row of the batch stands at its own length.

    Attributes:
        lengths: (B,) int64, tokens that each row has seen.
        longest: no row is longer than this; a plain int, so that no shape waits for the device.
        tensors: what the mixer keeps, by name, batch first.
    """

    lengths: Tensor
    longest: int
    tensors: dict[str, Tensor]

    @classmethod
    def empty(cls, batch_size: int, device: torch.device, **tensors: Tensor) -> Self:
        """The state before the first token."""
        lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        return cls(lengths=lengths, longest=0, tensors=tensors)

    def advance(self, length: int, valid: Tensor | None) -> None:
        """Count `length` more tokens, of which `valid` (B,) are a row's own (default: all)."""
        self.lengths = self.lengths + (length if valid is None else valid)
        self.longest += length

    def reserve(self, slots: int, *names: str) -> None:
        """Make room for `slots` entries along axis 2 of the named tensors, at least doubling what grows."""
        for name in names:
            x = self.tensors[name]
            if x.shape[2] < slots:
                room = x.new_zeros(*x.shape[:2], max(slots, 2 * x.shape[2]), *x.shape[3:])
                room[:, :, : x.shape[2]] = x
                self.tensors[name] = room

    def select(self, rows: Tensor) -> Self:
        """The state of the given rows (n,), in that order and as often as they are named: drops or forks."""
        tensors = {name: x.index_select(0, rows) for name, x in self.tensors.items()}
        return replace(self, lengths=self.lengths.index_select(0, rows), tensors=tensors)

    def to(self, device: torch.device | str) -> Self:
        """The same state on another device."""
        tensors = {name: x.to(device) for name, x in self.tensors.items()}
        return replace(self, lengths=self.lengths.to(device), tensors=tensors)

    def num_bytes(self) -> int:
        """Bytes that the tensors occupy."""
        return sum(x.nbytes for x in self.tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, for torch.save or safetensors; they share memory with this state."""
        return {"lengths": self.lengths} | {name: x.contiguous() for name, x in self.tensors.items()}

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Tensor]) -> Self:
        """The state that `state_dict` saved."""
        tensors = {name: x for name, x in saved.items() if name != "lengths"}
        lengths = saved["lengths"]
        return cls(lengths=lengths, longest=int(lengths.max()), tensors=tensors)
