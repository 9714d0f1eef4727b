import importlib
from collections.abc import Callable, Iterator

import pytest
import torch

from rat import ops
from rat.ops import backend
from rat.ops.backend import describe_backend, implementations, select
from rat.ops.launch import record_launches

X = torch.ones(1, 3, 2, 4)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
CALLS: dict[str, Callable[..., object]] = {
    "gated_scan": lambda **which: ops.gated_scan(X[0], [X[0]], **which),
    "chunk_scan": lambda **which: ops.chunk_scan(X[0], [X[0]], chunk_size=2, **which),
    "chunk_attention": lambda **which: ops.chunk_attention(X, X, X, chunk_size=2, **which),
    "output_gate": lambda **which: ops.output_gate(X[0], X[0], **which),
    "rotary": lambda **which: ops.rotary(X, torch.arange(3), **which),
    "sliding_window_attention": lambda **which: ops.sliding_window_attention(X, X, X, window_size=1, **which),
}
FOLDERS = {name: f"rat.ops.{name}" for name in CALLS} | {"sliding_window_attention": "rat.ops.sliding_window"}
VERSIONS = {name: name for name in ops.BACKENDS if name != "auto"}


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that cannot build the CPU kernels, unless a test says otherwise."""
    monkeypatch.setattr(backend.native, "why_not_native", lambda: "there is no C++ compiler")


@pytest.fixture(autouse=True)
def _auto_before_and_after() -> Iterator[None]:
    assert ops.get_backend() == "auto"
    yield
    ops.set_backend("auto")


@pytest.fixture(params=CALLS)
def telling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An op whose versions only tell which one ran."""
    folder = importlib.import_module(FOLDERS[request.param])
    versions = {name: lambda *_, name=name: name for name in folder._IMPLEMENTATIONS}
    monkeypatch.setattr(folder, "_IMPLEMENTATIONS", versions)
    return request.param


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], torch.Tensor]:
    """gpu(major, minor): as if there were one of this compute capability, and a tensor on it."""

    class OnGPU:
        device, dtype = GPU, torch.bfloat16

    def pretend(major: int, minor: int) -> OnGPU:
        monkeypatch.setattr(backend, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
        return OnGPU()

    return pretend


@pytest.mark.parametrize(
    ("process_wide", "in_the_call", "runs"),
    [
        ("auto", None, "portable"),
        ("portable", None, "portable"),
        ("reference", None, "reference"),
        ("reference", "auto", "portable"),
        ("reference", "portable", "portable"),
        ("portable", "reference", "reference"),
    ],
)
def test_a_call_overrules_the_process_wide_choice(
    telling: str, process_wide: ops.Backend, in_the_call: ops.Backend | None, runs: str
) -> None:
    ops.set_backend(process_wide)
    assert CALLS[telling](backend=in_the_call) == runs


def test_a_with_block_puts_the_choice_back_even_after_an_error() -> None:
    with ops.use_backend("reference"):
        with ops.use_backend("portable"):
            assert ops.get_backend() == "portable"
        assert ops.get_backend() == "reference"
    with pytest.raises(RuntimeError, match="stop"), ops.use_backend("reference"):
        raise RuntimeError("stop")
    assert ops.get_backend() == "auto"


def test_every_op_has_the_two_versions_that_run_anywhere() -> None:
    for name, folder in FOLDERS.items():
        assert {"reference", "portable"} <= set(implementations(folder, name))


@pytest.mark.parametrize("name", ["reference", "portable", "flex"])
def test_every_op_answers_to_every_backend_of_pytorch(name: ops.Backend) -> None:
    for call in CALLS.values():
        call(backend=name)


def test_an_op_without_the_version_takes_the_next_simpler_one_that_can_run(gpu: Callable[..., torch.Tensor]) -> None:
    scan = {name: name for name in VERSIONS if name not in ("flex", "native", "triton")}
    window = {name: name for name in VERSIONS if name not in ("native", "triton")}
    assert select(scan, "flex", X) == "portable"
    assert select(window, "flex", X) == "flex"
    assert select(scan, "triton", gpu(8, 0)) == "portable"
    assert select(window, "triton", gpu(8, 0)) == select(window, "auto", gpu(9, 0)) == "flex"
    single = gpu(8, 0)
    single.dtype = torch.float32
    assert select(window, "triton", single) == select(window, "auto", single) == "portable"
    assert select(window, "flex", single) == "flex"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.native, "why_not_native", lambda: None)
        assert select(window, "native", X) == select(window, "auto", X) == "portable"
    with record_launches((8, 0)):  # on CPU tensors, where FlexAttention has no backward
        assert select(window, "triton", X) == "portable"


def test_auto_takes_the_cpu_kernels_where_they_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select(VERSIONS, "auto", X) == "portable"
    no_compiler = r"there is no C\+\+ compiler"
    assert describe_backend("auto", CPU, True) == (
        "kernel backend auto: portable on the cpu, not native: there is no C++ compiler"
    )
    with pytest.raises(ValueError, match=f"native cannot run: {no_compiler}; choose auto or portable"):
        select(VERSIONS, "native", X)
    with pytest.raises(ValueError, match=no_compiler):
        describe_backend("native", CPU, True)
    monkeypatch.setattr(backend.native, "why_not_native", lambda: None)
    assert select(VERSIONS, "auto", X) == select(VERSIONS, "native", X) == "native"
    assert describe_backend("auto", CPU, True) == "kernel backend auto: native on the cpu, the fastest there"
    with pytest.raises(
        ValueError, match="native cannot run: its kernels are for the CPU, and the tensors are on the cuda"
    ):
        describe_backend("native", GPU, True)


def test_auto_takes_the_fastest_that_can_run(gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        assert select(VERSIONS, "auto", gpu(*capability)) == "triton"
    assert select(VERSIONS, "auto", gpu(7, 5)) == "portable"
    double = gpu(9, 0)
    double.dtype = torch.float64
    assert select(VERSIONS, "auto", double) == "portable"
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert select(VERSIONS, "auto", gpu(9, 0)) == "portable"


@pytest.mark.parametrize("interpreted", [False, True])
def test_auto_never_takes_the_interpreter(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", interpreted)
    assert select(VERSIONS, "auto", X) == "portable"
    with record_launches((9, 0)):
        assert select(VERSIONS, "auto", X) == "triton"
    if interpreted:
        assert select(VERSIONS, "triton", X) == "triton"


UNFIT = {
    "no GPU": (lambda gpu, patch: None, CPU, "need an NVIDIA GPU, and the tensors are on the cpu"),
    "an old GPU": (lambda gpu, patch: gpu(7, 5), GPU, "need sm_80 or newer, and this GPU is sm_75"),
    "no triton": (lambda gpu, patch: patch.setattr(backend, "HAS_TRITON", False), CPU, "triton is not installed"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_triton_where_it_cannot_run_is_refused_with_the_reason_and_the_fix(
    case: str, gpu: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", False)
    prepare, device, reason = UNFIT[case]
    like = prepare(gpu, monkeypatch) or X
    message = rf"kernel backend triton cannot run: .*{reason}; choose auto or portable"
    with pytest.raises(ValueError, match=message):
        select(VERSIONS, "triton", like)
    with pytest.raises(ValueError, match=message):
        describe_backend("triton", device, training=True)
    assert select(VERSIONS, "auto", like) == "portable"
    if device == GPU:
        assert f"portable on Some GPU (sm_75), not triton: its kernels {reason}" in describe_backend(
            "auto", device, True
        )


def test_what_was_chosen_is_described_with_the_reason(gpu: Callable[..., torch.Tensor]) -> None:
    gpu(9, 0)
    assert describe_backend("auto", GPU, True) == "kernel backend auto: triton on Some GPU (sm_90), the fastest there"
    assert describe_backend("portable", CPU, True) == "kernel backend portable on the cpu, as it was asked for"
    assert describe_backend("flex", GPU, True) == "kernel backend flex on Some GPU (sm_90), as it was asked for"
    assert describe_backend("flex", CPU, False) == "kernel backend flex on the cpu, as it was asked for"
    with pytest.raises(ValueError, match="flex cannot train: FlexAttention has no backward pass on the cpu"):
        describe_backend("flex", CPU, True)


def test_the_choice_is_a_constant_to_torch_compile(gpu: Callable[..., torch.Tensor]) -> None:
    gpu(7, 5)
    why = torch.compile(lambda x: x + (len(backend.why_not_triton(GPU)) > 0), fullgraph=True, backend="eager")
    assert why(torch.zeros(())) == 1


@pytest.mark.parametrize(
    "choose",
    [
        ops.set_backend,
        lambda name: describe_backend(name, CPU, True),
        lambda name: ops.use_backend(name).__enter__(),
        lambda name: select({"reference": print, "portable": print}, name, X),
        *[lambda name, call=call: call(backend=name) for call in CALLS.values()],
    ],
)
def test_an_unknown_backend_is_named_with_those_there_are(choose: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"unknown kernel backend 'cuda'.*auto, reference, portable"):
        choose("cuda")
    assert ops.get_backend() == "auto"
