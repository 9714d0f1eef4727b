"""What only a GPU shows. `make gpu-check` runs this file; without a GPU it is skipped.

The kernels' arithmetic is proven in Triton's interpreter. Here they run as they are compiled, bf16 and FlexAttention
included, at the widths, lengths and chunk sizes that are too large for the interpreter.
"""

from collections.abc import Iterator

import pytest
import torch

from rat import CausalLM, ModelConfig, ops
from rat.benchmarks.kernel_cases import CASES, DTYPES, WIDTHS, Shape, random_fill
from rat.benchmarks.kernel_races import contenders, errors_of, outcome
from rat.ops.backend import describe_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = torch.device("cuda")
# `errors_of` cuts rows to 8 chunks, or a few tiles, and 5 tokens: a tail behind every tile and chunk.
SHAPES = {
    f"d {width}": Shape(d_model=4 * width, d_head=width, chunk_size=16, num_groups=2, window_size=40, seq_len=1000)
    for width in WIDTHS
} | {
    "chunks of one token": Shape(d_model=128, d_head=64, chunk_size=1, num_groups=1, window_size=3, seq_len=1000),
    "short chunks": Shape(d_model=192, d_head=32, chunk_size=3, num_groups=3, window_size=1, seq_len=1000),
    "long chunks": Shape(d_model=128, d_head=64, chunk_size=200, num_groups=1, window_size=200, seq_len=2000),
    "one short row": Shape(d_model=128, d_head=64, chunk_size=16, num_groups=2, window_size=16, seq_len=7),
    "padded heads": Shape(d_model=160, d_head=40, chunk_size=5, num_groups=2, window_size=9, seq_len=300),
}
# FlexAttention takes half a minute to compile for each.
FEW = [SHAPES[name] for name in ("d 128", "one short row", "padded heads")]


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Memory that nothing has written to reads as NaN, also on a GPU."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=GPU).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
def test_every_version_is_as_exact_as_plain_pytorch(
    name: str, shape: Shape, dtype: torch.dtype, nan_memory: None
) -> None:
    versions = [version for version in contenders(CASES[name], dtype, GPU) if version != "flex" or shape in FEW]
    for version, error in errors_of(CASES[name], shape, dtype, GPU, versions).items():
        assert error <= 1, f"{version}: {error:.2f} times the error that is allowed"


@pytest.mark.parametrize("name", CASES)
def test_runs_repeat_bit_for_bit(name: str) -> None:
    if "triton" not in CASES[name].versions():
        pytest.skip("PyTorch's flash kernel adds gradients up in any order")
    first, second = (outcome(CASES[name], SHAPES["d 64"], torch.bfloat16, GPU, "auto") for _ in range(2))
    for value, expected in first.items():
        assert torch.equal(second[value], expected), value


@pytest.mark.parametrize("pattern", [["rat"], ["rnn"], ["rat", "sliding_window"], ["attention"]], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_trains_as_on_plain_pytorch(pattern: list[str], compiled: bool) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 128, "num_layers": 2, "num_heads": 2, "chunk_size": 8, "max_seq_len": 512, "window_size": 100}
    model = CausalLM(ModelConfig(vocab_size=200, pattern=pattern, **sizes)).to(GPU)
    gradients = []
    for backend in ("auto", "portable"):
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True) if compiled else model
        for length in (300, 411):  # the second one of another length
            ids = torch.randint(200, (2, length), generator=torch.Generator().manual_seed(length)).to(GPU)
            documents = torch.arange(length, device=GPU).expand(2, -1) // 130
            model.zero_grad()
            with ops.use_backend(backend):
                logits = torch.cat([run(ids), run(ids, document_ids=documents)])
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.repeat(2, 1).flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("pattern", [["rat"], ["rnn"], ["rat", "sliding_window"]], ids=str)
def test_a_model_writes_as_on_plain_pytorch(pattern: list[str]) -> None:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=99, d_model=64, num_layers=2, num_heads=2, chunk_size=4, pattern=pattern))
    model = model.to(GPU).eval()
    prompts = [torch.arange(n) % 99 for n in (1, 7, 60)]
    texts = []
    for backend in ("auto", "portable"):
        with ops.use_backend(backend):
            texts.append(model.generate(prompts, max_new_tokens=20))
    assert texts[0] == texts[1]


def test_no_kernel_is_compiled_again_because_a_length_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    compiled: list[str] = []
    compile_one = JITFunction._do_compile

    def told(self: JITFunction, *args: object, **options: object) -> object:
        compiled.append(self.__name__)
        return compile_one(self, *args, **options)

    shape = SHAPES["d 64"]
    for name, case in CASES.items():
        if "triton" not in case.versions():
            continue
        for turn, length in enumerate((1000, 8192, 641, 4096, 999, 16000)):
            # the first two may: decoding splits its work where there is much of it
            monkeypatch.setattr(JITFunction, "_do_compile", told if turn > 1 else compile_one)
            fill = random_fill(0, torch.bfloat16, GPU)
            call = case.make(Shape(**{**vars(shape), "seq_len": length}), fill)
            leaves = {n: x.detach().requires_grad_(call.trains) for n, x in call.tensors.items()}
            with torch.set_grad_enabled(call.trains):
                outputs = call.run(leaves, "triton")
            if call.trains:
                torch.autograd.grad(sum(out.float().sum() for out in outputs), list(leaves.values()), allow_unused=True)
        assert not compiled, name


def test_offsets_beyond_31_bits() -> None:
    """2^31 numbers in a stream: the last chunks alone must be what they are at the end of the row."""
    width, size = 2048, 16
    length = 2**31 // width + 5 * size
    if torch.cuda.mem_get_info()[0] < 10 * 2 * length * width:
        pytest.skip("needs 43 GB of free GPU memory")
    gate, v, k = (torch.randn(1, length, width, device=GPU, dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad():
        (v_out, k_out), _ = ops.chunk_scan(gate, (v, k), chunk_size=size, backend="triton")
        tail = slice(length - 4 * size, length)
        (v_tail, k_tail), _ = ops.chunk_scan(gate[:, tail], (v[:, tail], k[:, tail]), chunk_size=size, backend="triton")
        torch.testing.assert_close(v_out[:, tail], v_tail, atol=0, rtol=0)
        torch.testing.assert_close(k_out[:, tail], k_tail, atol=0, rtol=0)
        del gate, v, k, v_tail, k_tail
        k, v = (x.unflatten(-1, (16, width // 16)) for x in (k_out, v_out))
        q, long = k[:, :, :2], 4096
        out = ops.chunk_attention(q, k, v, chunk_size=long, rope_base=1e4, backend="triton")
        ends = tuple(x[:, long - 1 :: long] for x in (k, v))
        ends = (ops.rotary(ends[0], torch.arange(ends[0].shape[1], device=GPU), base=1e4), ends[1])
        alone = ops.chunk_attention(
            *(x[:, tail] for x in (q, k, v)), chunk_size=long, rope_base=1e4, ends=ends,
            offset=torch.tensor([tail.start], device=GPU), backend="portable",
        )  # fmt: skip
    torch.testing.assert_close(out[:, tail].float(), alone.float(), atol=2e-2, rtol=2e-2)


def test_auto_is_triton_here() -> None:
    assert "kernel backend auto: triton on" in describe_backend("auto", GPU, training=True)
