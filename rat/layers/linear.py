"""The projections of a layer."""

from typing import Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from rat.ops import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` without a bias, by the kernel backend that is chosen.

    Where `rat.tensor_parallel.split_heads` has dealt the weight out, two of them go together: one whose outputs are
    split takes what all ranks have and gives each its own channels, one whose inputs are split takes these and gives
    all ranks the sum. What the ranks share is added up once forward, behind the second, and once backward, before
    the first.
    """

    split: Literal["outputs", "inputs"] | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); of the features that are split, this rank's."""
        weight = self.weight
        if self.split is None:
            return linear(x, weight)
        assert isinstance(weight, DTensor)
        mesh, own = weight.device_mesh, weight.to_local()
        if self.split == "outputs":
            same = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
            return linear(same.to_local(grad_placements=[Partial()]), own.reshape(-1, self.in_features))
        part = linear(x, own.reshape(self.out_features, -1))
        return DTensor.from_local(part, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()
