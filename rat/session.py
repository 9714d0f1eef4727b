"""A text that a model reads and writes in turns, and what it remembers of it: in memory, or in a file."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rat.config import ModelConfig
from rat.generation import Sampling, pad_prompts
from rat.layers import LayerState
from rat.model import CausalLM

_FORMAT = {"format": "rat-session", "version": "1"}


class Session:
    """One text of a model, of which every token is read once, however often it is continued.

    A model's `generate` and `stream` take it as `past`, once it is `read`, and leave it as it is.

    Args:
        model: that reads and writes.

    Attributes:
        tokens: the text, written and given.
        state: of the model, for one row, after those of the tokens that were read.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.tokens: list[int] = []
        self.state = model.new_state(1)
        self._read = 0
        self._logits: Tensor | None = None

    def add(self, tokens: Sequence[int]) -> None:
        """Go on with these tokens; the model reads them when it has to write. Raises ValueError as `pad_prompts`."""
        if tokens:
            pad_prompts([tokens], self.model.config.vocab_size, torch.device("cpu"))
        self.tokens += tokens

    @torch.inference_mode()
    def read(self) -> None:
        """Let the model read what it has not yet read."""
        if new := self.tokens[self._read :]:
            ids, lengths = pad_prompts([new], self.model.config.vocab_size, self.state[0].lengths.device)
            self._logits = self.model.prefill(ids, lengths, self.state)
            self._read = len(self.tokens)

    @torch.inference_mode()
    def write(
        self,
        max_new_tokens: int,
        sampling: Sampling,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """Continue the text, and hand out each token as it is drawn. Whoever takes no more of them ends it there.

        Args:
            max_new_tokens: at most so many.
            sampling: how they are drawn.
            eos_token_id: ends the writing where it is drawn, and does not become part of the text.
            generator: of the draws, on the model's device; torch's global one by default.

        Raises:
            ValueError: there is no text to continue, or a negative number of tokens.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if not self.tokens:
            raise ValueError("there is no text to continue: add some tokens first")
        device = self.state[0].lengths.device
        seen = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool, device=device)
        seen[0, self.tokens] = True
        for _ in range(max_new_tokens):
            self.read()
            assert self._logits is not None
            token = int(sampling.draw(self._logits, seen, generator))
            if token == eos_token_id:
                return
            seen[0, token] = True
            self.tokens.append(token)
            yield token

    def save(self, path: Path) -> None:
        """Read what is left to read, and write text, state and which model's they are to `path`: whole, or not at all.

        Raises:
            ValueError: there is no text.
        """
        self.read()
        if self._logits is None:
            raise ValueError("there is no text to save: add some tokens first")
        tensors = {"tokens": torch.tensor(self.tokens), "logits": self._logits}
        for i, part in enumerate(self.state):
            tensors |= {f"{i}.{name}": x for name, x in part.state_dict().items()}
        known = {"identity": model_identity(self.model), "config": json.dumps(self.model.config.to_dict())}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as unfinished:
            partial = Path(unfinished, path.name)
            save_file({name: x.contiguous() for name, x in tensors.items()}, partial, metadata=_FORMAT | known)
            os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, model: CausalLM) -> Self:
        """The session that `save` wrote, on the model's device.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: another kind of file, damaged, or another model's.
        """
        if not path.is_file():
            raise FileNotFoundError(f"there is no saved state {path}")
        try:
            with safe_open(path, framework="pt") as file:
                known = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is no saved state, or damaged: {error}") from None
        if {name: known.get(name) for name in _FORMAT} != _FORMAT:
            raise ValueError(f"{path} is no saved state of this version of the code: read the text again")
        if known["identity"] != model_identity(model):
            saved = ModelConfig.from_dict(json.loads(known["config"]), str(path))
            changed = saved.differences(model.config) or "its weights are others"
            raise ValueError(f"{path} is the state of another model ({changed}): read the text again with this one")
        session = cls(model)
        device = session.state[0].lengths.device
        parts = range(len(session.state))
        own = [{n.partition(".")[2]: x for n, x in tensors.items() if n.startswith(f"{i}.")} for i in parts]
        session.state = [LayerState.from_state_dict(part).to(device) for part in own]
        session.tokens, session._logits = tensors["tokens"].tolist(), tensors["logits"].to(device)
        session._read = len(session.tokens)
        return session


def model_identity(model: CausalLM) -> str:
    """What tells a model from all others: a sha256 over its architecture and weights, wherever they are."""
    config = model.config.to_dict()
    same = {name: config[name] for name in sorted(config) if name not in ("init_std", "max_seq_len")}
    digest = hashlib.sha256(json.dumps(same).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
