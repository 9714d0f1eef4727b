"""A launch on paper and in the interpreter, with a kernel that doubles numbers."""

import pytest
import torch

from rat.ops.backend import HAS_TRITON, INTERPRETED
from rat.ops.launch import Cost, capability, is_recording, launch, record_launches

if not (HAS_TRITON and INTERPRETED):
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

CPU = torch.device("cpu")
COST = Cost(40, 20, 10)


@triton.jit(do_not_specialize=["length"])
def scaled(x, out, length, factor, SIZE: tl.constexpr):  # noqa: N803
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = places < length
    tl.store(out + places, tl.load(x + places, inside, 0.0) * factor, inside)


def run(x: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, -1)
    launch(scaled, (3,), x, out, len(x), 2.0, cost=COST, num_warps=2, SIZE=4)
    return out


def test_a_launch_runs_every_program() -> None:
    assert run(torch.arange(10.0)).tolist() == [2.0 * i for i in range(10)]
    assert not is_recording()


def test_a_launch_on_paper_runs_nothing_and_keeps_what_the_compiler_would_see() -> None:
    x = torch.arange(12, dtype=torch.float16)
    with record_launches((9, 0)) as launches:
        assert is_recording()
        assert (run(x[1:]) == -1).all()
    (made,) = launches
    assert made.kernel is scaled
    assert made.args == {"x": torch.float16, "out": torch.float16, "length": 11, "factor": 2.0}
    assert made.unaligned == {"x"}
    assert (made.grid, made.constants, made.cost) == ((3,), {"SIZE": 4}, COST)
    assert (made.num_warps, made.num_stages) == (2, 2)


def test_tile_sizes_are_those_of_the_gpu_on_paper() -> None:
    assert capability(CPU) == (0, 0)
    with record_launches((9, 0)):
        with record_launches((8, 0)) as inner:
            assert capability(CPU) == (8, 0)
            run(torch.ones(2))
        assert len(inner) == 1
        assert capability(CPU) == (9, 0)


def test_recording_ends_with_its_block_even_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), record_launches((8, 0)):
        raise RuntimeError("stop")
    assert not is_recording()


def test_arguments_that_are_not_the_kernels_are_refused_on_paper_too() -> None:
    with record_launches((8, 0)) as launches, pytest.raises(ValueError, match="zip"):
        launch(scaled, (1,), torch.ones(2), 3, cost=COST, SIZE=4)
    assert launches == []


def test_a_kernel_goes_to_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 1)

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *args, **options: entered.append(options["SIZE"])

    class Context:
        def __init__(self, device: torch.device) -> None:
            entered.append(device)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Context)
    launch(Kernel(), (1,), 5, torch.ones(2).as_subclass(OnGPU), cost=COST, SIZE=4)
    assert entered == [torch.device("cuda", 1), 4]
