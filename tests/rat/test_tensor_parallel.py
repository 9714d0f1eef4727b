"""Heads dealt out over processes: loss, logits, gradients and what is generated are those of one process."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from ranks import checked_together
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rat import CausalLM, ContextShard, ModelConfig
from rat.config import MixerName
from rat.layers import Block
from rat.ops import Backend, use_backend
from rat.tensor_parallel import check_ranks, shard_axis, split_heads

BATCH, VOCAB, CHUNK = 4, 32, 4


@dataclass(frozen=True)
class Case:
    """A model, and how its passes run."""

    pattern: tuple[MixerName, ...]
    num_heads: int = 8
    num_groups: int = 2
    length: int = 13
    backend: Backend = "portable"
    dtype: torch.dtype = torch.float64
    recomputed: bool = False
    compiled: bool = False

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=VOCAB, d_model=4 * self.num_heads, num_layers=len(self.pattern), num_heads=self.num_heads,
            num_groups=self.num_groups, pattern=self.pattern, chunk_size=CHUNK, window_size=3, max_seq_len=16,
            init_std=0.2,
        )  # fmt: skip

    def model(self) -> CausalLM:
        torch.manual_seed(0)
        model = CausalLM(self.config).to(self.dtype)
        with torch.no_grad():  # as training leaves them: no two channels are alike
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        if self.recomputed:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
        if self.compiled:
            for block in model.layers:
                block.compile()
        return model

    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and labels."""
        tokens = torch.randint(VOCAB, (BATCH, self.length + 1), generator=torch.Generator().manual_seed(1))
        return tokens[:, :-1], tokens[:, 1:]


HYBRID = Case(("rat", "sliding_window", "attention", "rnn"))
CASES = [
    Case(("rat", "rat")),
    Case(("rat", "rat"), num_groups=4),
    Case(("rat", "rat"), num_groups=8),
    Case(("attention",)),
    Case(("sliding_window",)),
    Case(("rnn", "rnn")),
    HYBRID,
    replace(HYBRID, recomputed=True),
    replace(HYBRID, backend="native", dtype=torch.float32),
]
# Without a GPU the Triton kernels run in the interpreter, see tests/conftest.py.
INTERPRETED = Case(("rat",), num_heads=2, length=5, backend="triton", dtype=torch.float32)


def tensor_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))


def results(
    case: Case, prepare: Callable[[CausalLM], None], rows: slice = slice(None), shard: ContextShard | None = None
) -> dict[str, Tensor]:
    """Loss, logits and the gradient of every parameter, whole."""
    model = case.model()
    shapes = [p.shape for p in model.parameters()]
    prepare(model)
    input_ids, labels = (x[rows] if shard is None else shard.part(x[rows]) for x in case.batch())
    with use_backend(case.backend):
        loss = model(input_ids, labels, shard=shard)
        loss.backward()
        found = {"loss": loss.detach()}
        for (name, p), shape in zip(model.named_parameters(), shapes, strict=True):
            gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            found[name.replace("_checkpoint_wrapped_module.", "")] = gradient.reshape(shape)
        with torch.no_grad():
            return found | {"logits": model(input_ids, shard=shard)}


def whole(model: CausalLM) -> None:
    """Left as it is."""


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    # A recurrence's state stays in fp32.
    exact = case.dtype == torch.float64 and "rnn" not in case.pattern
    tolerance = 1e-12 if exact else 2e-5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, msg=lambda m: f"{case}: {m}")


def split_and_whole_agree() -> None:
    mesh = tensor_mesh()
    for case in CASES:
        if case.num_groups % mesh.size() == 0:
            assert_alike(results(case, partial(split_heads, mesh=mesh)), results(case, whole), case)


def four_sums_a_layer() -> None:
    """Of D numbers a token, two forward and two backward, and one more where a layer is recomputed, up to its last."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    for case, sums in ((HYBRID, 4), (replace(HYBRID, recomputed=True), 5)):
        with torch.profiler.profile(activities=cpu, record_shapes=True) as profiler:
            model = case.model()
            split_heads(model, tensor_mesh())
            model(*case.batch()).backward()
        calls = [e.name for e in profiler.events() if e.name.startswith("c10d::")]
        assert calls == ["c10d::allreduce_"] * sums * len(case.pattern), case
        summed = [e.input_shapes[0] for e in profiler.events() if e.name == "_c10d_functional::all_reduce"]
        assert summed == [[BATCH, case.length, case.config.d_model]] * len(calls), case


def what_is_generated_agrees() -> None:
    """Prompts of different lengths, by sampling as well; the state holds this rank's heads."""
    mesh, prompts = tensor_mesh(), [[1, 2, 3, 4, 5, 6, 7], [8, 9]]
    for case in (HYBRID, replace(HYBRID, backend="native", dtype=torch.float32)):
        one, split = case.model(), case.model()
        split_heads(split, mesh)
        with use_backend(case.backend):
            wanted, found = (
                [
                    model.generate(prompts, max_new_tokens=9, **options)
                    for options in ({}, {"temperature": 1.0, "generator": torch.Generator().manual_seed(3)})
                ]
                for model in (one, split)
            )
            states = [model.new_state(2, 16) for model in (one, split)]
        assert found == wanted, case
        for mine, theirs in zip(*states, strict=True):
            assert mine.num_bytes() == mesh.size() * theirs.num_bytes()


def sharded(model: CausalLM, mesh: DeviceMesh) -> None:
    """Split over the dimension "tensor" of a mesh, and each part sharded over "shard"."""
    split_heads(model, mesh["tensor"])
    place = partial(shard_axis, num_shards=mesh["shard"].size())
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh["shard"], shard_placement_fn=place)


def parts_may_be_sharded() -> None:
    """FSDP2 averages over ranks that see other rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("shard", "tensor"))
    shards, own = mesh["shard"].size(), mesh["shard"].get_local_rank()
    rows = slice(own * BATCH // shards, (own + 1) * BATCH // shards)
    cases = [replace(HYBRID, num_heads=6, recomputed=True)]  # 11 blocks of rows a rank, and 3 of the gate's bias
    if shards > 1:
        cases.append(replace(HYBRID, compiled=True))
    for case in cases:
        expected = results(case, whole)
        found = results(case, partial(sharded, mesh=mesh), rows)
        dist.all_reduce(found["loss"], group=mesh["shard"].get_group())
        found["loss"] /= shards
        assert_alike(found, expected | {"logits": expected["logits"][rows]}, case)


def rows_may_be_dealt_out_as_well() -> None:
    """Ranks 0 and 1 hold the first tokens, 2 and 3 the last; each two share the heads."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    shard = ContextShard.of(HYBRID.length, CHUNK, mesh["context"].get_group())
    expected, found = results(HYBRID, whole), results(HYBRID, partial(split_heads, mesh=mesh["tensor"]), shard=shard)
    for name, x in found.items():
        if name not in ("loss", "logits"):
            dist.all_reduce(x, group=shard.group)
            x /= shard.num_ranks
    assert_alike(found, expected | {"logits": shard.part(expected["logits"])}, HYBRID)


def bf16_is_as_good_as_in_one_process() -> None:
    case = replace(HYBRID, dtype=torch.float32)
    split, wanted = partial(split_heads, mesh=tensor_mesh()), results(case, whole)
    with torch.autocast("cpu", torch.bfloat16):
        usual, found = results(case, whole), results(case, split)
    for name, x in wanted.items():
        error, allowed = ((other[name] - x).norm() for other in (found, usual))
        assert error <= 1.5 * allowed + 1e-3 * x.norm(), (name, error, allowed)


def triton_agrees() -> None:
    split, row = partial(split_heads, mesh=tensor_mesh()), slice(1)
    assert_alike(results(INTERPRETED, split, row), results(INTERPRETED, whole, row), INTERPRETED)


def test_two_ranks() -> None:
    assert {name for case in CASES for name in case.pattern} == set(get_args(MixerName))
    checked_together(
        2,
        split_and_whole_agree,
        four_sums_a_layer,
        what_is_generated_agrees,
        parts_may_be_sharded,
        bf16_is_as_good_as_in_one_process,
        triton_agrees,
    )


@pytest.mark.slow
def test_four_ranks() -> None:
    checked_together(4, split_and_whole_agree, parts_may_be_sharded, rows_may_be_dealt_out_as_well)


@pytest.mark.parametrize(
    ("num_ranks", "pattern", "message"),
    [
        (4, ("rat",), "4 tensor-parallel ranks do not divide num_groups 2: choose a divisor of it, or another"),
        (3, ("attention",), "3 tensor-parallel ranks do not divide num_heads 8"),
        (3, ("rnn", "rat"), "3 tensor-parallel ranks do not divide num_groups 2"),
    ],
)
def test_ranks_that_cannot_share_the_heads_are_refused(
    num_ranks: int, pattern: tuple[MixerName, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_ranks(Case(pattern).config, num_ranks)
    check_ranks(Case(("attention", "rnn")).config, 4)
