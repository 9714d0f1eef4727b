"""The kernel report: what it counts, what it makes of compiled kernels, where it writes, and what it refuses."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rat
from rat.benchmarks import ahead_of_time, kernel_races, kernels, traffic
from rat.benchmarks.ahead_of_time import CHIPS, Compiled
from rat.benchmarks.kernel_cases import CASES, SHIPPED, Shape, empty_fill, random_fill
from rat.ops.launch import Launch

TINY = Shape(d_model=32, d_head=16, chunk_size=3, num_groups=1, window_size=4, seq_len=10)
CPU = torch.device("cpu")
A100, H100, B200 = (CHIPS[capability] for capability in ((8, 0), (9, 0), (10, 0)))
NEEDS = {"registers": 64, "spilled": 0, "shared": 0, "tensor_columns": 0, "num_warps": 4, "tensor_cores": "mma"}
TRITON = [name for name, case in CASES.items() if "triton" in case.versions()]


@pytest.mark.parametrize(
    ("needs", "chip", "warps"),
    [
        ({}, A100, 32),  # 64 registers x 32 threads x 32 warps = 65536
        ({"registers": 32}, A100, 64),
        ({"registers": 33}, A100, 48),  # given out by 256: 40 x 32 = 1280
        ({"registers": 80, "num_warps": 1}, A100, 24),  # 25 would fit, but a quarter of the registers holds 6
        ({"registers": 255, "num_warps": 8}, H100, 8),
        ({"registers": 32, "num_warps": 1}, H100, 32),  # no more than 32 blocks
        ({"registers": 32, "shared": 40 * 1024}, A100, 16),  # 4 x (40 + 1) KB = 164 KB
        ({"registers": 32, "shared": 41 * 1024}, A100, 12),
        ({"registers": 32, "shared": 54 * 1024}, A100, 8),
        ({"registers": 32, "shared": 41 * 1024}, H100, 20),
        ({"registers": 32, "tensor_columns": 256}, B200, 8),
        ({"registers": 255, "num_warps": 16}, A100, 0),
    ],
)
def test_resident_warps_follow_from_what_a_kernel_needs(needs: dict[str, int], chip: object, warps: int) -> None:
    assert Compiled(**NEEDS | needs).resident_warps(chip) == warps


def test_what_does_not_fit_a_chip_is_told() -> None:
    assert Compiled(**NEEDS).faults(A100) == []
    assert Compiled(**NEEDS | {"spilled": 8}).faults(A100) == ["8 bytes of registers spilled"]
    big = Compiled(**NEEDS | {"shared": 200 * 1024})
    assert big.faults(H100) == []
    assert big.faults(A100)[0] == "204800 bytes of shared memory, A100 gives a block 166912"


@pytest.mark.parametrize("name", CASES)
def test_every_case_calls_its_op_as_a_layer_does(name: str) -> None:
    case = CASES[name]
    calls = [case.make(TINY, random_fill(3, torch.float32, CPU)) for _ in range(2)]
    with torch.no_grad():
        exact, plain = (
            call.run(call.tensors, backend) for call, backend in zip(calls, ("reference", "portable"), strict=True)
        )
    torch.testing.assert_close(plain, exact, atol=2e-5, rtol=2e-5)
    tensors = calls[0].tensors
    if "gate" in tensors:
        assert tensors["gate"].untyped_storage().data_ptr() == tensors["v"].untyped_storage().data_ptr()


def test_the_least_bytes_are_inputs_and_outputs_once() -> None:
    call = CASES["chunk attention"].make(TINY, random_fill(0, torch.bfloat16, CPU))
    with torch.no_grad():
        outputs = call.run(call.tensors, "portable")
    q, k = 10 * 16, 10 * 32
    assert call.bytes_forward(outputs) == 2 * (q + 3 * k)
    assert call.bytes_backward(outputs) == 2 * 2 * (q + 3 * k)
    # tokens see 1, 1, 1, 2, 2, 2, 3, 3, 3 and 4 terms; 2 products of 2 x 16 operations in each of 2 heads
    assert call.flops == 4 * 32 * 22


def test_bytes_of_plain_pytorch_inside_an_op_are_counted() -> None:
    @torch.library.custom_op("rat_tests::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x.expand(3, *x.shape).transpose(0, 1)[:, 0]) * 2

    x = torch.ones(10)
    with traffic._Traffic() as counted:
        doubled(x.view(2, 5))
    assert counted.num_bytes == 40 + 40 + 40 + 40  # copied: read and written; doubled: read and written
    with traffic._Traffic() as counted:
        torch.empty(1000), x.view(5, 2).T.unsqueeze(0)
    assert counted.num_bytes == 0
    with traffic._Traffic() as counted:
        x.expand(7, 10).sum(0)
    assert counted.num_bytes == 80


@pytest.mark.parametrize("name", TRITON)
def test_recorded_passes_are_those_of_a_layer(name: str) -> None:
    passes = list(traffic.record(CASES[name], TINY, torch.bfloat16, (9, 0)))
    trains = CASES[name].make(TINY, empty_fill(torch.float32, CPU)).trains
    assert [p.direction for p in passes] == ["forward", "backward"][: 1 + trains]
    for p in passes:
        assert p.launches
        assert all(isinstance(x, Launch) for x in p.launches)
        assert p.bytes_moved > p.bytes_minimum / 2


def specialised(launch: Launch) -> tuple[object, ...]:
    """All that Triton compiles a kernel anew for."""
    free = launch.kernel.kwargs["do_not_specialize"] or ()
    numbers = {n: x for n, x in launch.args.items() if isinstance(x, int)}
    kinds = {n: (x == 1, x % 16 == 0) for n, x in numbers.items() if n not in free}
    tensors = {n: x for n, x in launch.args.items() if n not in numbers}
    return (
        launch.kernel.__name__,
        tensors,
        launch.unaligned,
        kinds,
        launch.constants,
        launch.num_warps,
        launch.num_stages,
    )


@pytest.mark.parametrize("name", TRITON)
def test_no_kernel_is_compiled_again_because_a_length_changed(name: str) -> None:
    lengths = (100, 101, 160, 185)  # less than what decoding splits
    shapes = [Shape(**vars(TINY) | {"seq_len": length, "batch_size": 1 + length % 2}) for length in lengths]
    shapes[1:1] = [Shape(**vars(TINY) | {"seq_len": 100, "batch_size": 3})]
    seen = [
        [[specialised(x) for x in p.launches] for p in traffic.record(CASES[name], shape, torch.bfloat16, (8, 0))]
        for shape in shapes
    ]
    assert seen[1:] == seen[:1] * len(lengths)


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """canned(spilled=...): nothing is compiled, every kernel needs the same."""

    def pretend(**needs: int) -> None:
        monkeypatch.setattr(kernels, "check_compiler", lambda: None)
        compiled = Compiled(**NEEDS | needs)
        monkeypatch.setattr(
            kernels, "compile_launches", lambda launches, capability, done: [compiled for _ in launches]
        )
        monkeypatch.setitem(SHIPPED, "synthetic", (TINY, (torch.float32,)))

    return pretend


def test_the_report_prints_writes_and_keeps_its_tables(
    canned: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canned()
    page = tmp_path / "page.md"
    page.write_text("# Kernels\n\n<!-- begin kernels -->\nold\n<!-- end kernels -->\n\nThe end.\n")
    kernels.kernels_benchmark(
        compile_only=True, archs=[80, 90], configs=["synthetic"], page=page, output=tmp_path / "results"
    )
    text, said = page.read_text(), capsys.readouterr().out
    assert "old" not in text
    assert text.index("Of sm_80 (A100), sm_90 (H100)") < text.index("The end.") < text.index("<!-- begin window -->")
    line = "| chunk decode | forward | `decode` | 4 | 64 | 0 | 0.0 | 32 | mma |"
    assert line in text
    assert line in said
    results = json.loads((tmp_path / "results" / "kernels.json").read_text())
    assert {row["case"] for row in results["rows"]} == set(TRITON)
    assert results["rows"][0]["compiled"]["sm_90"]["registers"] == 64
    assert {row["direction"] for row in results["traffic"]} == {"forward", "backward"}


def test_a_kernel_that_spills_is_an_error_after_all_is_told(canned: Callable[..., None], tmp_path: Path) -> None:
    canned(spilled=16)
    with pytest.raises(
        ValueError, match=r"do not fit: .*decode of chunk decode \(synthetic, float32\): sm_100: 16 bytes"
    ):
        kernels.kernels_benchmark(compile_only=True, archs=[100], configs=["synthetic"], output=tmp_path)
    assert json.loads((tmp_path / "kernels.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no GPU here: bench kernels needs one, or --compile-only"),
        ({"compile_only": True}, "TRITON_INTERPRET=1 makes them Python functions; run this without that variable"),
        ({"compile_only": True, "archs": [75]}, "unknown compute capability 75: choose from 80, 90, 100"),
        ({"configs": ["xxl"]}, "unknown config 'xxl': choose from xl, quickstart, synthetic"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_be_is_refused_at_once(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.kernels_benchmark(**options, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="there is no page"):
        kernels.kernels_benchmark(page=tmp_path / "none.md")


def test_pairs_in_a_window_are_counted_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE", 4)
    monkeypatch.setattr("rat.ops.spans.TILE", 4)
    length, window = 21, 6
    seen = [(t, j) for t in range(length) for j in range(length) if 0 <= t - j <= window]
    tiles = {(t // 4, j // 4) for t, j in seen}
    pairs = kernels.window_pairs(length, window)
    assert (pairs["needed"], pairs["flex"], pairs["flash"]) == (len(seen), 16 * len(tiles), 16 * 21)
    assert pairs["portable"] == 21 + 15 * 21  # causal among the first 6 queries; 15 rows against 15 + 6 keys


@pytest.mark.parametrize("name", ["gated scan, one token", "chunk scan", "chunk decode"])
def test_errors_are_shares_of_what_is_allowed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Shape(d_model=16, d_head=16, chunk_size=1, num_groups=1, window_size=2, seq_len=2)
    errors = kernel_races.errors_of(CASES[name], tiny, torch.float32, CPU, ["triton", "portable"])
    assert 0 < errors["portable"] <= 0.5
    assert errors["triton"] <= 1
    outcome, added = kernel_races.outcome, []

    def wrong(*args: object) -> dict[str, torch.Tensor]:
        values = outcome(*args)
        if args[4] == "triton":
            last = list(values)[-1]
            values[last] = values[last] + added[-1]
        return values

    monkeypatch.setattr(kernel_races, "outcome", wrong)
    for more in (1e-4, math.nan):
        added.append(more)
        assert not kernel_races.errors_of(CASES[name], tiny, torch.float32, CPU, ["triton"])["triton"] <= 1


KERNELS = """
import sys

import torch
import triton
import triton.language as tl

from rat.benchmarks.ahead_of_time import compile_launches
from rat.ops.launch import Cost, launch, record_launches


@triton.jit(do_not_specialize=["length"])
def product(a, b, out, length, stride, scale, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE), tl.arange(0, SIZE)
    places = rows[:, None] * stride + columns
    inside = rows[:, None] < length
    x, y = tl.load(a + places, inside, 0.0), tl.load(b + places, inside, 0.0)
    tl.store(out + places, (tl.dot(x, y) * scale).to(out.dtype.element_ty), inside)


def run(length, **options):
    a, b, out = (torch.empty(64 * 64, dtype=torch.bfloat16) for _ in range(3))
    launch(product, (1,), a, b, out, length, 64, 0.5, cost=Cost(1, 2, 3), SIZE=64, **options)


for capability in ((8, 0), (9, 0)):
    with record_launches(capability) as launches:
        run(64)
        if capability == (8, 0):
            run(63)
            run(64, maxnreg=32)
    told = []
    for found in compile_launches(launches, capability, told.append):
        print(found.tensor_cores, found.spilled > 0, found.shared > 0, found.num_warps, found.registers)
    print(sum(told))
"""


@pytest.mark.skipif(not ahead_of_time.HAS_TRITON, reason="needs Triton")
def test_kernels_are_compiled_for_gpus_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    root = Path(kernels.__file__).parents[2]
    done = subprocess.run([sys.executable, tmp_path / "kernels.py"], cwd=root, env=None, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    kinds = [line.rsplit(" ", 1)[0] for line in lines if " " in line]
    assert kinds == ["mma False True 4", "mma False True 4", "mma True True 4", "wgmma False True 4"]
    assert [line for line in lines if " " not in line] == ["3", "1"]
    assert lines[0] == lines[1]  # a length is not specialised


@pytest.mark.slow
def test_no_kernel_of_the_papers_layer_spills_or_outgrows_its_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "cli.py", "bench", "kernels", "--compile-only", "--configs", "[xl]"]
    done = subprocess.run(
        [*command, "--output", tmp_path],
        cwd=Path(rat.__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "chunk attention" in done.stdout
