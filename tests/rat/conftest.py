"""Golden cases, models that are easy to tell apart, and what counts as equal."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rat import CausalLM, ModelConfig
from rat.config import MixerName
from rat.interop.released import rename

GOLDEN = Path(__file__).parent.parent / "golden"
PATTERNS: dict[str, list[MixerName]] = {
    "rat": ["rat"],
    "rnn": ["rnn"],
    "attention": ["attention"],
    "local": ["sliding_window"],
    "rat_local": ["rat", "sliding_window"],
    "attention_local": ["attention", "sliding_window"],
}


@dataclass(frozen=True)
class GoldenCase:
    """One tiny model run by an independent implementation, under our names."""

    folder: Path
    config: ModelConfig
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def model(self) -> CausalLM:
        """The case's model with its weights."""
        model = CausalLM(self.config)
        weights = load_file(self.folder / "weights.safetensors")
        model.load_state_dict({rename(name): x for name, x in weights.items()})
        return model

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter."""
        return {rename(n.removeprefix("grad.")): x for n, x in self.tensors.items() if n.startswith("grad.")}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], GoldenCase]:
    """The golden case of a name."""

    def load(name: str) -> GoldenCase:
        facts = json.loads((GOLDEN / name / "case.json").read_text())
        told = facts["config"]
        config = ModelConfig(
            vocab_size=told["vocab_size"],
            d_model=told["d_model"],
            num_layers=told["layers"],
            num_heads=told["d_model"] // told["d_head"],
            pattern=PATTERNS[told["arch"]],
            chunk_size=told["chunk_size"],
            num_groups=told["ngroups"],
            window_size=told["window_size"],
            rope_base=told["rope_base"],
            max_seq_len=told["seq_len"],
        )
        return GoldenCase(GOLDEN / name, config, facts, load_file(GOLDEN / name / "io.safetensors"))

    return load


@pytest.fixture(scope="session")
def stir() -> Callable[[nn.Module], None]:
    """Draw weights so large that each part of a module shows in its output, and gates of every memory length."""

    def draw(module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, x in module.named_parameters():
                fan_in = x.shape[1] if x.ndim == 2 else 1
                x.normal_(generator=generator).mul_(fan_in**-0.5)
                if x.ndim == 2:  # or the residual makes every token its own successor
                    x.mul_(0.5 if "embedding" in name else 2)
                if "norm" in name:
                    x.mul_(0.3).add_(1)

    return draw


class MakeModel(Protocol):
    """How the fixture `make_model` is called."""

    def __call__(self, *pattern: MixerName, **fields: Any) -> CausalLM: ...


@pytest.fixture(scope="session")
def make_model(stir: Callable[[nn.Module], None]) -> MakeModel:
    """A model of 40 token ids with 4 heads of 4 in 2 groups, chunks of 4 and windows of 3; fields may differ."""

    def make(*pattern: MixerName, **fields: Any) -> CausalLM:
        values = {"vocab_size": 40, "d_model": 16, "num_layers": max(2, len(pattern)), "num_heads": 4}
        values |= {"chunk_size": 4, "window_size": 3, "max_seq_len": 24}
        model = CausalLM(ModelConfig(pattern=pattern, **values | fields))
        stir(model)
        return model

    return make


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Differences stay below a share of the largest magnitude expected."""

    def check(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
        assert actual.shape == expected.shape, what
        error = (actual.double() - expected.double()).abs().max()
        largest = expected.double().abs().max()
        assert error <= tolerance * largest, f"{what}: off by {error:.2e}, the largest magnitude is {largest:.2e}"

    return check


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[CausalLM, CausalLM], None]:
    """Two models agree in names, types and every bit."""

    def check(actual: CausalLM, expected: CausalLM) -> None:
        found, wanted = actual.state_dict(), expected.state_dict()
        assert found.keys() == wanted.keys()
        for name, x in found.items():
            assert x.dtype == wanted[name].dtype, name
            assert torch.equal(x, wanted[name]), name

    return check


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., Tensor]:
    """Token ids below 40 of a shape."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))

    return draw
