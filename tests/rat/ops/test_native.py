"""How the CPU kernels are built and kept, and what all of them share: numbers, threads, processes."""

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rat.ops import chunk_attention, chunk_scan, gated_scan, native, output_gate
from rat.ops.backend import describe_backend

Values = dict[str, Tensor]
CPU = torch.device("cpu")
X = torch.ones(1, 2, 3)
if native.why_not_native():
    pytest.skip("no C++ compiler", allow_module_level=True)
BUILT = native.library()._name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, for this process as if it had not loaded anything yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for known in (native.library, native.why_not_native):
        known.cache_clear()
    yield tmp_path / "cache" / "rat-lab"
    for known in (native.library, native.why_not_native):
        known.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """compiler(work): CXX names a script that does this work for the output $2; returns its log, a line a call."""
    log = tmp_path / "calls.log"

    def make(work: str) -> Path:
        script = tmp_path / "c++"
        script.write_text(f'#!/bin/sh\necho called >>{log}\nwhile [ "$1" != -o ]; do shift; done\n{work}\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return make


def run_portable() -> None:
    """What a user sees where the kernels cannot be had: nothing, unless they are asked for."""
    reason = native.why_not_native()
    assert reason
    assert describe_backend("auto", CPU, True) == f"kernel backend auto: portable on the cpu, not native: {reason}"
    torch.testing.assert_close(output_gate(X, X), torch.sigmoid(X))
    with pytest.raises(ValueError, match="choose auto or portable") as error:
        output_gate(X, X, backend="native")
    assert reason in str(error.value)


def test_the_kernels_are_built_once_at_their_first_use_into_the_users_cache(
    cache: Path, compiler: Callable[[str], Path]
) -> None:
    log = compiler(f'cp {BUILT} "$2"')
    for _ in range(2):
        output_gate(X, X, backend="native")
        native.library.cache_clear()
    assert log.read_text() == "called\n"
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_processes_that_start_together_do_not_meet_and_the_next_finds_what_they_built(
    cache: Path, compiler: Callable[[str], Path]
) -> None:
    log = compiler(f'head -c 999 {BUILT} >"$2"; sleep 0.3; cp {BUILT} "$2"; sleep 0.3')  # half a library for a while
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    others = [context.Process(target=lambda: answers.put(native.why_not_native())) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
    assert [answers.get(), answers.get()] == [None, None]
    assert log.read_text() == "called\n" * 2
    assert native.why_not_native() is None
    assert log.read_text() == "called\n" * 2
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("change", ["option", "header", "source", "processor", "compiler"])
def test_whatever_changes_the_library_changes_its_name(
    change: str, cache: Path, compiler: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = compiler(f'cp {BUILT} "$2"')
    shutil.copytree(Path(native.__file__).parent, tmp_path / "ops")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "ops" / "native.py"))
    native.library.__wrapped__()
    if change == "option":
        monkeypatch.setattr(native, "_OPTIONS", (*native._OPTIONS, "-g"))
    elif change == "processor":
        monkeypatch.setattr(native, "_processor", lambda: "another")
    elif change == "compiler":
        monkeypatch.setenv("CXX", str(shutil.copy(tmp_path / "c++", tmp_path / "g++")))
    else:
        with open(tmp_path / "ops" / {"header": "native.h", "source": "output_gate/native.cpp"}[change], "a") as file:
            file.write("// changed\n")
    native.library.__wrapped__()
    assert log.read_text() == "called\n" * 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(("variable", "value"), [("CXX", "no-such-compiler"), ("PATH", "")])
def test_without_a_compiler_everything_runs_on_pytorch(
    variable: str, value: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    run_portable()
    assert "there is no C++ compiler (install one as c++, or let CXX name it)" in native.why_not_native()


def test_a_compile_error_is_named_and_leaves_nothing_behind(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "op").mkdir()
    (tmp_path / "native.h").write_text("")
    (tmp_path / "op" / "native.cpp").write_text('#error "the reason"\n')
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    run_portable()
    assert "cannot compile them: " in native.why_not_native()
    assert "the reason" in native.why_not_native()
    assert list(cache.iterdir()) == []


def test_a_compiler_that_is_interrupted_leaves_nothing_behind(cache: Path, compiler: Callable[[str], Path]) -> None:
    compiler(f'head -c 999 {BUILT} >"$2"; exit 3')
    run_portable()
    assert "cannot compile them: status 3" in native.why_not_native()
    assert list(cache.iterdir()) == []


def test_a_library_that_cannot_be_kept_or_loaded_is_no_reason_to_fail(
    cache: Path, compiler: Callable[[str], Path]
) -> None:
    compiler('echo garbage >"$2"')
    run_portable()
    assert "cannot be kept or loaded" in native.why_not_native()
    native.why_not_native.cache_clear()
    shutil.rmtree(cache)
    cache.touch()  # a file where the folder should be
    run_portable()
    assert "XDG_CACHE_HOME names another folder" in native.why_not_native()


def gates(z: Tensor, x: Tensor) -> Tensor:
    return output_gate(z.view(1, 1, -1), x.expand(z.numel()).view(1, 1, -1), backend="native").flatten()


def test_the_exponential_is_exact_to_a_few_units_in_the_last_place() -> None:
    z = torch.linspace(-87, 87, 100_003)
    exact = torch.sigmoid(z.double())
    assert ((gates(z, torch.ones(1)) - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact).all()


def test_infinities_and_nan_are_what_they_are_in_pytorch() -> None:
    inf, nan = torch.inf, torch.nan
    z = torch.tensor([nan, inf, -inf, 1e30, -1e30, 88.5, -88.5, 1e-42, 0.0])
    torch.testing.assert_close(gates(z, torch.ones(1)), torch.sigmoid(z), atol=1e-37, rtol=1e-6, equal_nan=True)
    x = torch.tensor([nan, inf, -inf, 1e38])
    torch.testing.assert_close(gates(torch.full((4,), 100.0), x), x, equal_nan=True)
    tiny = torch.tensor([1e-40])
    assert gates(torch.full((1,), 100.0), tiny) == tiny, "subnormal numbers are not flushed"
    assert tiny * 1.0 == tiny, "nor does loading the library let PyTorch flush them"


def test_bf16_is_rounded_to_nearest_ties_to_even() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    equal = partial(torch.testing.assert_close, atol=0, rtol=0, equal_nan=True)
    equal(gates(torch.full_like(every, 100), every), every)
    # half of a state in fp32, whose bits go beyond those of bf16
    any_bits = torch.linspace(-3, 3, 20_001)
    ties = (any_bits.bfloat16().float().view(torch.int32) | 0x8000).view(torch.float32)
    full_nan = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # whose rounding would carry over
    state = torch.cat([any_bits, ties, torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38]), full_nan])
    zeros = torch.zeros(1, 1, len(state), dtype=torch.bfloat16)
    (out,), (last,) = gated_scan(zeros, [zeros], initial_state=[state[None]], backend="native")
    equal(last[0], state / 2)
    equal(out[0, 0], (state / 2).bfloat16())


@pytest.fixture
def results(
    draw: Callable[..., Tensor], differentiate: Callable[..., Values], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], dict[str, Values]]:
    """results(threads): outputs and gradients of every operation, over enough tokens to be shared out."""
    monkeypatch.setattr(native, "FEWEST_ELEMENTS", 1)
    tokens = 1100
    scan = {"gate_logits": (1, tokens, 160), "gate_bias": (160,), "v": (1, tokens, 160), "k": (1, tokens, 80)}
    shapes = dict.fromkeys(("chunk scan", "gated scan"), scan)
    shapes["chunk attention"] = {"q": (1, tokens, 1, 8), "k": (1, tokens, 4, 8), "v": (1, tokens, 4, 8)}
    shapes["output gate"] = {"gate_logits": (1, tokens, 32), "x": (1, tokens, 32)}
    ops = {
        "chunk scan": lambda gate_logits, gate_bias, v, k, **options: chunk_scan(
            gate_logits, (v, k), gate_bias=gate_bias, chunk_size=16, **options
        ),
        "gated scan": lambda gate_logits, gate_bias, v, k, **options: gated_scan(
            gate_logits, (v, k), gate_bias=gate_bias, **options
        ),
        "chunk attention": partial(chunk_attention, chunk_size=16, rope_base=100.0),
        "output gate": output_gate,
    }

    def run(threads: int) -> dict[str, Values]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            inputs = {name: {x: draw(i, *shape) for i, (x, shape) in enumerate(shapes[name].items())} for name in ops}
            return {
                name: differentiate(partial(op, backend="native"), inputs[name], torch.float32)
                for name, op in ops.items()
            }
        finally:
            torch.set_num_threads(before)

    return run


def test_a_thread_is_not_woken_for_less_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    shares = [native.threads(share * native.FEWEST_ELEMENTS // 2) for share in (0, 1, 2, 5, 7, 100)]
    assert shares == [1, 1, 1, 2, 3, 4]


def test_the_number_of_threads_changes_no_result_but_for_the_order_of_pytorchs_own_sums(
    results: Callable[[int], dict[str, Values]],
) -> None:
    one, two = results(1), results(2)
    for name, values in one.items():
        for value, x in values.items():
            tolerance = 1e-5 if name == "chunk attention" or value == "gradient of gate_bias" else 0.0
            torch.testing.assert_close(two[name][value], x, atol=tolerance, rtol=tolerance)


class Gates(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return output_gate(X, index * X, backend="native")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_compute_the_same(start: str, results: Callable[[int], dict[str, Values]]) -> None:
    results(2)  # threads of ours are waiting when the others start
    expected = [output_gate(X, i * X, backend="native") for i in range(4)]
    if start == "fork":
        found = list(DataLoader(Gates(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.starmap_async(partial(output_gate, backend="native"), [(X, i * X) for i in range(4)]).get(60)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
