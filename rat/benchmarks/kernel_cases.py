"""What the kernels are compiled, checked and timed with: the configs' sizes, and each operation as a layer calls it.

Inputs lie in memory as they do in a layer: what comes from one projection are slices of one tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rat import ops
from rat.ops.backend import Backend, implementations
from rat.ops.documents import positions

Fill = Callable[..., Tensor]
ROPE_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a layer and of what goes through it."""

    d_model: int
    d_head: int
    chunk_size: int
    num_groups: int
    window_size: int
    seq_len: int
    batch_size: int = 1

    @property
    def num_heads(self) -> int:
        """H."""
        return self.d_model // self.d_head

    def __str__(self) -> str:
        return (
            f"D {self.d_model}, d {self.d_head}, L {self.chunk_size}, G {self.num_groups}, W {self.window_size},"
            f" {self.batch_size} x T {self.seq_len}"
        )


# The layers of configs/**, which tests/configs compares with this, and the dtypes that they meet: that of training,
# and fp32, in which `generate` runs them.
SHIPPED: dict[str, tuple[Shape, tuple[torch.dtype, ...]]] = {
    "xl": (
        Shape(d_model=2048, d_head=128, chunk_size=16, num_groups=2, window_size=1024, seq_len=4096),
        (torch.bfloat16, torch.float32),
    ),
    "quickstart": (
        Shape(d_model=256, d_head=64, chunk_size=16, num_groups=1, window_size=64, seq_len=256),
        (torch.bfloat16, torch.float32),
    ),
    "synthetic": (
        Shape(d_model=128, d_head=32, chunk_size=4, num_groups=2, window_size=16, seq_len=64),
        (torch.float32,),
    ),
}
# What the kernels promise beyond the configs: every head width, in every dtype.
WIDTHS, DTYPES = (16, 32, 64, 128, 256), (torch.bfloat16, torch.float16, torch.float32)
EVERY_WIDTH: dict[str, tuple[Shape, tuple[torch.dtype, ...]]] = {
    f"d {width}": (replace(SHIPPED["xl"][0], d_model=8 * width, d_head=width), DTYPES) for width in WIDTHS
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of an operation that is ready to be made."""

    tensors: dict[str, Tensor]  # floating inputs
    run: Callable[..., tuple[Tensor, ...]]  # run(tensors, backend): outputs, those written in place included
    trains: bool  # has a backward pass
    flops: int | None  # of the forward pass by the cost model; None where bytes are all that counts

    def bytes_forward(self, outputs: tuple[Tensor, ...]) -> int:
        """Every input read once, every output written once."""
        return _nbytes(*self.tensors.values(), *outputs)

    def bytes_backward(self, outputs: tuple[Tensor, ...]) -> int:
        """Inputs, outputs and the outputs' gradients read once, the inputs' gradients written once."""
        return 2 * _nbytes(*self.tensors.values(), *outputs)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation in a situation."""

    function: str
    make: Callable[[Shape, Fill], Call]  # fill(*sizes, dtype=...) gives a tensor; without dtype in that of activations

    def versions(self) -> Mapping[str, object]:
        """The operation's implementations, by backend."""
        folder = "sliding_window" if self.function == "sliding_window_attention" else self.function
        return implementations(f"rat.ops.{folder}", self.function)


def random_fill(seed: int, dtype: torch.dtype, device: torch.device) -> Fill:
    """Normal numbers, the same ones for the same seed; drawn in fp32 whatever they are wanted in."""
    generator = torch.Generator(device).manual_seed(seed)
    wanted = dtype

    def fill(*sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype or wanted)

    return fill


def empty_fill(dtype: torch.dtype, device: torch.device) -> Fill:
    """Memory that nobody has written to."""
    wanted = dtype

    def fill(*sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(sizes, device=device, dtype=dtype or wanted)

    return fill


def documents_of(shape: Shape, device: torch.device) -> Tensor:
    """Rows of four documents and a rest, (B, T)."""
    length = max(1, shape.seq_len // 4 - 1)
    return (torch.arange(shape.seq_len, device=device) // length).expand(shape.batch_size, -1)


def _nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _projected(shape: Shape, fill: Fill, rnn: bool = False) -> list[Tensor]:
    """v, gate logits, and for RAT also q and k, as slices of one projection that begins with the output gate."""
    width, narrow = shape.d_model, shape.num_groups * shape.d_head
    widths = [width] * 3 if rnn else [width] * 3 + [narrow] * 2
    return list(fill(shape.batch_size, shape.seq_len, sum(widths)).split(widths, dim=-1)[1:])


def _gated_scan(shape: Shape, fill: Fill, documents: bool = False, step: bool = False) -> Call:
    shape = replace(shape, seq_len=1) if step else shape
    v, gate = _projected(shape, fill, rnn=True)
    tensors = {"gate": gate, "v": v, "bias": fill(shape.d_model, dtype=torch.float32)}
    if step:
        tensors["state"] = fill(shape.batch_size, shape.d_model, dtype=torch.float32)
    ids = documents_of(shape, gate.device) if documents else None

    def run(tensors: Mapping[str, Tensor], backend: Backend) -> tuple[Tensor, ...]:
        state = [tensors["state"]] if step else None
        outputs, finals = ops.gated_scan(
            tensors["gate"],
            [tensors["v"]],
            gate_bias=tensors["bias"],
            initial_state=state,
            document_ids=ids,
            backend=backend,
        )
        return *outputs, *finals

    return Call(tensors=tensors, run=run, trains=not step, flops=None)


def _past(shape: Shape, device: torch.device) -> Tensor:
    """As many tokens have gone before as come now, but for one in every other row."""
    return shape.seq_len - torch.arange(shape.batch_size, device=device) % 2


def _chunk_scan(shape: Shape, fill: Fill, documents: bool = False, continued: bool = False) -> Call:
    v, gate, _, k = _projected(shape, fill)
    tensors = {"gate": gate, "v": v, "k": k, "bias": fill(shape.d_model, dtype=torch.float32)}
    if continued:
        tensors |= {n: fill(shape.batch_size, shape.d_model, dtype=torch.float32) for n in ("v state", "k state")}
    past = _past(shape, gate.device) if continued else None
    lengths = None if past is None else torch.full_like(past, shape.seq_len)
    ids = documents_of(shape, gate.device) if documents else None

    def run(tensors: Mapping[str, Tensor], backend: Backend) -> tuple[Tensor, ...]:
        outputs, finals = ops.chunk_scan(
            tensors["gate"],
            [tensors["v"], tensors["k"]],
            gate_bias=tensors["bias"],
            chunk_size=shape.chunk_size,
            initial_state=[tensors["v state"], tensors["k state"]] if continued else None,
            offset=past,
            lengths=lengths,
            document_ids=ids,
            backend=backend,
        )
        return *outputs, *finals

    return Call(tensors=tensors, run=run, trains=not continued, flops=None)


def _chunk_attention(shape: Shape, fill: Fill, documents: bool = False, continued: bool = False) -> Call:
    heads = (shape.num_heads, shape.d_head)
    q = _projected(shape, fill)[2].unflatten(-1, (shape.num_groups, shape.d_head))
    tensors = {"q": q} | {n: fill(shape.batch_size, shape.seq_len, shape.d_model).unflatten(-1, heads) for n in "kv"}
    past = _past(shape, q.device) if continued else None
    if continued:
        slots = -(-2 * shape.seq_len // shape.chunk_size)
        cache = (shape.batch_size, shape.num_heads, slots, shape.d_head)
        tensors |= {n: fill(*cache).transpose(1, 2) for n in ("end keys", "end values")}
    ids = documents_of(shape, q.device) if documents else None
    seen = positions(shape.batch_size, shape.seq_len, ids, past, q.device) // shape.chunk_size + 1

    def run(tensors: Mapping[str, Tensor], backend: Backend) -> tuple[Tensor, ...]:
        return (
            ops.chunk_attention(
                *(tensors[n] for n in "qkv"),
                chunk_size=shape.chunk_size,
                rope_base=ROPE_BASE,
                offset=past,
                ends=(tensors["end keys"], tensors["end values"]) if continued else None,
                document_ids=ids,
                backend=backend,
            ),
        )

    return Call(tensors=tensors, run=run, trains=not continued, flops=4 * shape.d_model * int(seen.sum()))


def _chunk_decode(shape: Shape, fill: Fill) -> Call:
    rows, width, chunk = shape.batch_size, shape.d_model, shape.seq_len // shape.chunk_size
    v, gate, q, k = (x[:, 0] for x in _projected(replace(shape, seq_len=1), fill))
    cache = (rows, shape.num_heads, chunk + 1, shape.d_head)
    tensors = {"gate": gate, "q": q.unflatten(-1, (shape.num_groups, shape.d_head)), "k": k, "v": v}
    tensors |= {n: fill(rows, width, dtype=torch.float32) for n in ("value_state", "key_state")}
    tensors["bias"] = fill(width, dtype=torch.float32)
    tensors |= {n: fill(*cache) for n in ("end_keys", "end_values")}
    lengths = torch.full((rows,), shape.seq_len, device=v.device)

    def run(tensors: Mapping[str, Tensor], backend: Backend) -> tuple[Tensor, ...]:
        out = ops.chunk_decode(
            *(tensors[n] for n in ("gate", "q", "k", "v")),
            **{n: tensors[n] for n in ("value_state", "key_state", "end_keys", "end_values")},
            gate_bias=tensors["bias"],
            lengths=lengths,
            longest=shape.seq_len,
            chunk_size=shape.chunk_size,
            rope_base=ROPE_BASE,
            backend=backend,
        )
        slots = (tensors[n][:, :, chunk] for n in ("end_keys", "end_values"))
        return out, tensors["value_state"], tensors["key_state"], *slots

    return Call(tensors=tensors, run=run, trains=False, flops=4 * width * rows * (chunk + 1))


def _window(shape: Shape, fill: Fill, windowed: bool, documents: bool = False) -> Call:
    heads = (shape.num_heads, shape.d_head)
    tensors = {n: fill(shape.batch_size, shape.seq_len, shape.d_model).unflatten(-1, heads) for n in "qkv"}
    ids = documents_of(shape, tensors["q"].device) if documents else None
    size = shape.window_size if windowed else None
    place = positions(shape.batch_size, shape.seq_len, ids, None, tensors["q"].device)
    seen = (place if size is None else place.clamp(max=size)) + 1

    def run(tensors: Mapping[str, Tensor], backend: Backend) -> tuple[Tensor, ...]:
        q, k, v = (tensors[n] for n in "qkv")
        return (ops.sliding_window_attention(q, k, v, window_size=size, document_ids=ids, backend=backend),)

    return Call(tensors=tensors, run=run, trains=True, flops=4 * shape.d_model * int(seen.sum()))


CASES: dict[str, Case] = {
    "gated scan": Case(function="gated_scan", make=_gated_scan),
    "gated scan, documents": Case(function="gated_scan", make=partial(_gated_scan, documents=True)),
    "gated scan, one token": Case(function="gated_scan", make=partial(_gated_scan, step=True)),
    "chunk scan": Case(function="chunk_scan", make=_chunk_scan),
    "chunk scan, documents": Case(function="chunk_scan", make=partial(_chunk_scan, documents=True)),
    "chunk scan, continued": Case(function="chunk_scan", make=partial(_chunk_scan, continued=True)),
    "chunk attention": Case(function="chunk_attention", make=_chunk_attention),
    "chunk attention, documents": Case(function="chunk_attention", make=partial(_chunk_attention, documents=True)),
    "chunk attention, continued": Case(function="chunk_attention", make=partial(_chunk_attention, continued=True)),
    "chunk decode": Case(function="chunk_decode", make=_chunk_decode),
    "sliding window": Case(function="sliding_window_attention", make=partial(_window, windowed=True)),
    "sliding window, documents": Case(
        function="sliding_window_attention", make=partial(_window, windowed=True, documents=True)
    ),
    "attention": Case(function="sliding_window_attention", make=partial(_window, windowed=False)),
}
