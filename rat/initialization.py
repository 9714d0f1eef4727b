"""How every weight starts. This is the only place that says so.

- linear and embedding weights: N(0, init_std^2), whatever their place;
- norms: ones;
- gate biases of RAT: log U(1, L - 1), so that gates first remember 2 to L tokens; of the RNN: log U(1, T - 1).
  Where there is nothing to span (L = 1 or 2) the bias is log 1 = 0, a gate of one half.
"""

import torch
from torch import nn

from rat.layers import GatedMixer


def initialize(model: nn.Module, init_std: float) -> None:
    """Draw every weight of `model` anew from torch's global generator."""
    for module in model.modules():
        initialize_own(module, init_std)


def initialize_own(module: nn.Module, init_std: float) -> None:
    """As `initialize`, but only the weights that belong to `module` itself and not to its children."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=init_std)
    elif isinstance(module, nn.RMSNorm):
        nn.init.ones_(module.weight)
    if isinstance(module, GatedMixer):
        with torch.no_grad():
            module.gate_bias.uniform_(1.0, max(1.0, module.gate_span - 1.0)).log_()
