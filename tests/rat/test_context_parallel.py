"""Rows dealt out over processes: loss, logits and gradients are those of one process, the traffic is as counted."""

import inspect
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import checked_together
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard

from rat import CausalLM, ContextShard, ModelConfig
from rat.config import MixerName
from rat.context_parallel import bytes_per_token, ring_attention_bytes_per_token
from rat.layers import Block
from rat.layers.context_shard import deal, handed_on
from rat.ops import Backend, use_backend

BATCH, VOCAB = 2, 32


@dataclass(frozen=True)
class Case:
    """A model and the length of its rows."""

    pattern: tuple[MixerName, ...]
    length: int = 13
    chunk_size: int = 4
    backend: Backend = "portable"
    dtype: torch.dtype = torch.float32
    rope_base: float | None = 10000.0
    window_size: int = 3
    recomputed: bool = False

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=VOCAB,
            d_model=16,
            num_layers=len(self.pattern),
            num_heads=4,
            num_groups=2,
            pattern=self.pattern,
            chunk_size=self.chunk_size,
            window_size=self.window_size,
            rope_base=self.rope_base,
            max_seq_len=16,
            init_std=0.2,
        )

    def model(self) -> CausalLM:
        torch.manual_seed(0)
        model = CausalLM(self.config).to(self.dtype)
        if self.recomputed:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
        return model

    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and labels; half of the first row's targets, and so all of the first rank's there, do not count."""
        tokens = torch.randint(VOCAB, (BATCH, self.length + 1), generator=torch.Generator().manual_seed(1))
        labels = tokens[:, 1:].clone()
        labels[0, : self.length // 2 + 1] = -100
        return tokens[:, :-1], labels


DOUBLE = {"dtype": torch.float64}
MIXED = Case(("rat", "sliding_window", "attention", "rnn"), backend="native", length=23)
RECOMPUTED = Case(("rat", "sliding_window"), recomputed=True, **DOUBLE)
CASES = [
    Case(("rat", "rat"), **DOUBLE),
    Case(("rat", "rat"), chunk_size=1, **DOUBLE),
    Case(("rat", "rat"), chunk_size=8, length=21, **DOUBLE),
    Case(("rat", "rat"), length=12, rope_base=None, **DOUBLE),
    Case(("rat", "sliding_window"), **DOUBLE),
    Case(("rat", "sliding_window"), window_size=9, **DOUBLE),
    Case(("rat", "attention"), chunk_size=2, **DOUBLE),
    Case(("rat", "rnn"), recomputed=True),
    RECOMPUTED,
    MIXED,
    Case(("rat", "rat"), chunk_size=1, backend="native"),
]
# Without a GPU the Triton kernels run in the interpreter, see tests/conftest.py.
INTERPRETED = Case(("rat",), length=5, chunk_size=2, backend="triton")


def results(case: Case, shard: ContextShard | None = None) -> dict[str, Tensor]:
    """Loss, logits and the gradient of every parameter."""
    model, batch = case.model(), case.batch()
    input_ids, labels = batch if shard is None else (shard.part(x) for x in batch)
    with use_backend(case.backend):
        loss = model(input_ids, labels, shard=shard)
        loss.backward()
        with torch.no_grad():
            logits = model(input_ids, shard=shard)
    gradients = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "logits": logits, **gradients}


def averaged(found: dict[str, Tensor], shard: ContextShard) -> dict[str, Tensor]:
    """The gradients' mean over the ranks of the shard, as DDP makes it."""
    for name, x in found.items():
        if name not in ("loss", "logits"):
            dist.all_reduce(x, group=shard.group)
            x /= shard.num_ranks
    return found


def compare(case: Case, group: dist.ProcessGroup | None = None) -> None:
    expected = results(case)
    shard = ContextShard.of(case.length, case.chunk_size, group)
    found = averaged(results(case, shard), shard)
    expected["logits"] = shard.part(expected["logits"])
    # A recurrence's state stays in fp32.
    exact = case.dtype == torch.float64 and "rnn" not in case.pattern
    tolerance = 1e-12 if exact else 1e-6
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, msg=lambda m: f"{case}: {m}")


def whole_and_dealt_out_agree() -> None:
    for case in CASES:
        if math.ceil(case.length / case.chunk_size) >= dist.get_world_size():
            compare(case)


def traffic_is_as_counted() -> None:
    """A training step and, in `results`, another forward pass; recomputed layers send once more."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    for case, passes in ((MIXED, 3), (RECOMPUTED, 4)):
        shard = ContextShard.of(case.length, case.chunk_size)
        with torch.profiler.profile(activities=cpu, record_shapes=True) as profiler:
            results(case, shard)
        # forward and backward; nothing that is handed over comes back to its own rank
        calls = [e for e in profiler.events() if e.name == "_c10d_functional::all_to_all_single"]
        assert len(calls) == passes * len(case.pattern)
        sent = torch.tensor(sum(math.prod(call.input_shapes[0]) for call in calls) * case.dtype.itemsize)
        dist.all_reduce(sent)
        step = bytes_per_token(case.config, case.length, shard.num_ranks, case.dtype.itemsize)
        assert int(sent) == round(BATCH * case.length * step * passes / 2), case


def triton_agrees() -> None:
    compare(INTERPRETED)


def weights_may_be_sharded_over_the_same_ranks() -> None:
    """FSDP2 averages, as DDP does."""
    expected, model, shard = results(RECOMPUTED), RECOMPUTED.model(), ContextShard.of(RECOMPUTED.length, 4)
    mesh = dist.device_mesh.init_device_mesh("cpu", (shard.num_ranks,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    loss = model(*(shard.part(x) for x in RECOMPUTED.batch()), shard=shard)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"])
    for name, p in model.named_parameters():
        found = p.grad.full_tensor()
        torch.testing.assert_close(found, expected[name.replace("_checkpoint_wrapped_module.", "")])


def a_group_of_some_ranks_will_do() -> None:
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="not in the group"):
            ContextShard.of(13, 4, group)
    else:
        compare(CASES[0], group)


def bf16_is_as_good_as_in_one_process() -> None:
    exact = Case(("rat", "sliding_window"), length=30)
    shard = ContextShard.of(exact.length, exact.chunk_size)
    wanted = results(exact)
    with torch.autocast("cpu", torch.bfloat16):
        whole, found = results(exact), averaged(results(exact, shard), shard)
    for name in wanted:
        if name != "logits":
            error, usual = ((x[name] - wanted[name]).norm() for x in (found, whole))
            assert error <= 1.5 * usual + 1e-3 * wanted[name].norm(), (name, error, usual)


def test_two_ranks() -> None:
    checked_together(
        2,
        whole_and_dealt_out_agree,
        triton_agrees,
        weights_may_be_sharded_over_the_same_ranks,
        bf16_is_as_good_as_in_one_process,
    )


def test_three_ranks() -> None:
    checked_together(3, whole_and_dealt_out_agree, traffic_is_as_counted, a_group_of_some_ranks_will_do)


CHECK = """
expected = CausalLM(model.config)
expected.load_state_dict(model.state_dict())
expected_loss = expected(input_ids, labels)
expected_loss.backward()
torch.testing.assert_close(loss, expected_loss)
for p, q in zip(model.parameters(), expected.parameters(), strict=True):
    torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5)
dist.destroy_process_group()
"""


def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    doc = inspect.getdoc(ContextShard) or ""
    (tmp_path / "train.py").write_text(textwrap.dedent(doc[doc.index("::") + 2 :]) + CHECK)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("length", "chunk_size", "num_ranks", "borders"),
    [
        (13, 4, 1, (0, 13)),
        (13, 4, 2, (0, 8, 13)),
        (13, 4, 4, (0, 4, 8, 12, 13)),
        (16, 4, 3, (0, 4, 8, 16)),
        (7, 1, 3, (0, 2, 4, 7)),
        (9, 8, 2, (0, 8, 9)),
    ],
)
def test_shards_are_whole_chunks(length: int, chunk_size: int, num_ranks: int, borders: tuple[int, ...]) -> None:
    assert deal(length, chunk_size, num_ranks) == borders


def test_a_rank_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 13 tokens are 4 chunks of 4, and 5 ranks need one each"):
        deal(13, 4, 5)
    with pytest.raises(ValueError, match="length and chunk_size must be at least 1, got 0 and 4"):
        deal(0, 4, 1)


def test_what_is_no_part_of_a_row_is_refused() -> None:
    """Before anything is sent: there is no process group here."""
    case, shard = CASES[0], ContextShard((0, 8, 13), rank=1)
    model, ids = case.model(), torch.zeros(1, 5, dtype=torch.long)
    assert (shard.start, shard.length, shard.num_ranks) == (8, 5, 2)
    with pytest.raises(ValueError, match=r"rows of 13 tokens, got \(1, 5\)"):
        shard.part(ids)
    for name in ("rat", "sliding_window", "attention", "rnn"):
        model = Case((name,)).model()
        with pytest.raises(ValueError, match="shard is of 5 tokens, got 4"):
            model(ids[:, :4], shard=shard)
        with pytest.raises(ValueError, match="document_ids do not go with a shard"):
            model(ids, document_ids=ids, shard=shard)
    with pytest.raises(ValueError, match=r"begin at \[0, 6\] cut chunks of 4: make them with ContextShard.of"):
        case.model()(ids, shard=ContextShard((0, 6, 11), rank=1))


def test_only_what_is_seen_is_sent() -> None:
    borders = (0, 4, 5, 12)
    assert [handed_on(borders, s, t, None) for s in range(3) for t in range(3)] == [0, 4, 4, 0, 0, 1, 0, 0, 0]
    assert [handed_on(borders, s, t, 3) for s in range(3) for t in range(3)] == [0, 3, 2, 0, 0, 1, 0, 0, 0]


def test_traffic_is_that_of_the_formulas() -> None:
    """Even shards: 2 (R - 1) D / L numbers a token and layer for RAT, 3 L times fewer than ring attention's."""
    ranks, length, (d, layers, chunk) = 8, 1 << 17, (2048, 24, 16)
    sizes: dict[str, Any] = {"vocab_size": 32000, "d_model": d, "num_layers": layers, "num_heads": 16}
    config = ModelConfig(pattern=("rat",), chunk_size=chunk, **sizes)
    ring = ring_attention_bytes_per_token(config, ranks)
    assert ring == 2 * 6 * (ranks - 1) * d * layers
    assert bytes_per_token(config, length, ranks) == ring / (3 * chunk)
    window = ModelConfig(pattern=("sliding_window",), window_size=1024, **sizes)
    assert bytes_per_token(window, length, ranks) == 2 * 2 * 2 * d * layers * (ranks - 1) * 1024 / length
    rnn = ModelConfig(pattern=("rnn",), **sizes)
    assert bytes_per_token(rnn, length, ranks) == 2 * 4 * 2 * d * layers * ranks * (ranks - 1) / 2 / length
