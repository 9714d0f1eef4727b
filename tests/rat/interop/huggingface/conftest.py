"""Models of ours and the same ones as transformers sees them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from rat import CausalLM
from rat.interop.huggingface.modeling import RATForCausalLM

PATTERNS = [("rat",), ("rat", "sliding_window"), ("rnn",), ("attention",)]
LENGTHS = (3, 11, 7)


@pytest.fixture(autouse=True, scope="session")
def _no_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


class Batch(NamedTuple):
    """Prompts side by side."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, prompts: list[list[int]], side: str = "left") -> "Batch":
        """Padded with token 0 to the longest, on this side."""
        longest = max(map(len, prompts))
        ids, mask = [], []
        for prompt in prompts:
            padding = [0] * (longest - len(prompt))
            own = [1] * len(prompt)
            ids.append(padding + prompt if side == "left" else prompt + padding)
            mask.append(padding + own if side == "left" else own + padding)
        return cls(torch.tensor(ids), torch.tensor(mask))


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(params=PATTERNS, ids="-".join)
def model(request: pytest.FixtureRequest, make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model(*request.param)


@pytest.fixture
def folder(model: CausalLM, tmp_path: Path) -> Path:
    return model.save_pretrained(tmp_path / "model")


@pytest.fixture
def theirs(folder: Path) -> RATForCausalLM:
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert type(found) is RATForCausalLM
    return found
