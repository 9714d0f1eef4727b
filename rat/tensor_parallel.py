"""Tensor parallelism: the heads of every layer, and with them its weights, dealt out over ranks.

Rank r of N takes the heads h and, of RAT, the query-key sets g with h mod N = g mod N = r. Head h uses set h mod G, so
where N divides G a rank has all that its heads ask for, and its part is a RAT layer of H / N heads and G / N sets.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rat.config import ModelConfig
from rat.layers import GatedMixer
from rat.model import CausalLM


def split_heads(model: CausalLM, mesh: DeviceMesh) -> None:
    """Keep this rank's heads of every mixer and its channels of every feed-forward, in place.

    Every rank has to run the same passes on the same tokens, backward ones included. Loss, logits and gradients are
    then those of the whole model; the residual stream, norms and the embedding are whole on every rank.

    A split weight is a DTensor whose rows or columns are counted by three axes, (blocks / N, N, d), of which the ranks
    share the second: `reshape` to the shape that it had gives the whole weight. `fully_shard` may follow, over other
    dimensions of the mesh that this one is part of.

    Args:
        model: with the same weights on every rank.
        mesh: of one dimension, the N ranks.

    Raises:
        ValueError: N does not divide num_heads, or num_groups where a layer is RAT.
    """
    check_ranks(model.config, mesh.size())
    if mesh.size() == 1:
        return
    for block in model.layers:
        mixer, feed_forward = block.mixer, block.feed_forward
        mixer.num_ranks = mesh.size()
        for into, out_of in ((mixer.in_proj, mixer.out_proj), (feed_forward.fc1, feed_forward.fc2)):
            into.split, out_of.split = "outputs", "inputs"
            _deal(into, "weight", 0, mixer.d_head, mesh)
            _deal(out_of, "weight", 1, mixer.d_head, mesh)
        if isinstance(mixer, GatedMixer):
            _deal(mixer, "gate_bias", 0, mixer.d_head, mesh)


def check_ranks(config: ModelConfig, num_ranks: int) -> None:
    """Raise ValueError where so many ranks cannot share the layers of `config`."""
    groups = ("num_groups",) if "rat" in config.pattern else ()
    for name in (*groups, "num_heads"):
        if (count := getattr(config, name)) % num_ranks:
            raise ValueError(
                f"{num_ranks} tensor-parallel ranks do not divide {name} {count}: choose a divisor of it, or another"
                f" {name}"
            )


def shard_axis(weight: nn.Parameter, num_shards: int) -> Shard | None:
    """The `shard_placement_fn` of `fully_shard`: an axis that so many shards divide; None for its own choice.

    That is the first axis, which a weight of `split_heads` has only few entries on.
    """
    if not isinstance(weight, DTensor):
        return None
    taken = [placement.dim for placement in weight.placements if isinstance(placement, Shard)]
    even = (axis for axis, size in enumerate(weight.shape) if axis not in taken and size % num_shards == 0)
    return next(map(Shard, even), None)


def _deal(module: nn.Module, name: str, axis: int, d_head: int, mesh: DeviceMesh) -> None:
    """Keep every N-th block of `d_head` entries along an axis of a parameter."""
    whole = getattr(module, name).detach().unflatten(axis, (-1, mesh.size(), d_head))
    split = distribute_tensor(whole, mesh, [Shard(axis + 1)], src_data_rank=None)
    setattr(module, name, nn.Parameter(split))
