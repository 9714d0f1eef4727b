"""Every command and every block of Python of the pages runs, as it stands there, in a working copy of its own.

A page begins with a fresh copy of the repository, in which the quickstart has been trained for two steps on the
docstrings, and which holds small files by the names that the pages give to a reader's own. bash is given the
statements in their order; what makes them small is added to the calls of `python`, and stands in the tables below.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# The first pattern that a call fits tells what is added to it. A later option wins over an earlier one.
SMALL = "--trainer.enable_progress_bar false"
GRID = """--variants '{"rnn": {"model.model.pattern": ["rnn"]}}' --options '{
  "trainer.max_steps": 2, "model.val_every_n_steps": 2, "trainer.limit_val_batches": 1}'"""
ADDED = {
    "*--help*": "",
    "cli.py prepare pretrain --output data/docstrings *": "--source path/to/texts",
    "cli.py fit *": f"--trainer.max_steps 2 --model.val_every_n_steps 2 --trainer.limit_val_batches 1 {SMALL}",
    "cli.py validate *": f"--trainer.limit_val_batches 2 {SMALL}",
    "cli.py test *": f"--trainer.limit_test_batches 2 {SMALL}",
    "cli.py predict *": f"--trainer.limit_predict_batches 1 --data.init_args.max_new_tokens 4 {SMALL}",
    "cli.py generate *--prompts_file * --max_new_tokens 0 *": "",
    "cli.py generate *": "--max_new_tokens 8",
    "cli.py evaluate lengths *": "--lengths '[64, 128]' --windows 2",
    "cli.py evaluate *": "--limit 2",
    "cli.py bench layer *": "--seq_lens '[32]' --repeats 1 --batch_size 2 --d_model 256",
    "cli.py bench memory *": "--seq_lens '[32]'",
    "cli.py bench loader*": "--seconds 0.1",
    "cli.py bench prepare*": "--copies '[1]' --repeats 1 --vocab_size 500",
    "cli.py bench kernels *": "--configs '[synthetic]' --archs '[80]'",
    "cli.py sweep *": f"--runs runs/small --output $(mktemp -d) --seeds '[0]' --lengths null {GRID}",
    "docs/training_costs.py": "configs/experiment/fineweb_edu/rnn-xl.yaml",
}

# What is run by others, and where.
ELSEWHERE = {
    "make figures *": "tests/docs/test_draw_layer.py and, in Chromium, test_tensorboard.py",
    "make install": ".ci/run: make test asks for it",
    "make notebooks": "tests/notebooks/test_rendering.py",
    "make quickstart": "the working copy below is made by the lines of the Makefile",
    "make tensorboard": "tests/docs/test_tensorboard.py",
    "make test": ".ci/run",
    "make test-slow": ".ci/run: this is one of its tests",
    "python cli.py evaluate *--suite ruler*": "tests/rat/evaluation/test_tasks.py: its prompts take minutes",
    "python cli.py bench kernels *--every-width": "tests/rat/benchmarks/test_kernels.py, one width: all take long",
    "python cli.py bench throughput *": "tests/rat/benchmarks/test_throughput.py, smaller",
}

# What a block of Python finds, beside what it makes.
NAMES = {
    "README.md": """
import torch
input_ids, prompt_a, prompt_b = torch.randint(32000, (2, 40)), [1, 2, 3], [4, 5]
""",
    "training.md": """
import torch
from rat import CausalLM, ContextShard, ModelConfig
from torch import distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
replica = model = CausalLM(ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2, chunk_size=4))
input_ids, labels = torch.randint(64, (2, 2, 30))
""",
}


# What the process of the tests has and a command does not: `make test-slow` is itself called by make.
UNSET = {"TRITON_INTERPRET", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}

Bash = Callable[[str, Path], None]


@pytest.fixture(scope="session")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bash]:
    """Runs a text in a folder, with what is added to its calls; fails the test with what it printed."""
    folder, forks = tmp_path_factory.mktemp("forks"), ROOT / "tests/docs/forks.py"
    environment = {name: value for name, value in os.environ.items() if name not in UNSET} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",  # threads of small work wait for each other where cores are busy
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    address = folder / "socket"
    server = subprocess.Popen([sys.executable, forks, "serve", address], env=environment)
    cases = "".join(
        f'{pattern.replace(" ", chr(92) + " ")}) set -- "$@" {added} ;;\n' for pattern, added in ADDED.items()
    )
    calls = f"""
        python() {{
          case "$*" in
            {cases}
          esac
          case "$1" in
            cli.py) command "{sys.executable}" -SE "{forks}" call "{address}" "$@" ;;
            *) command "{sys.executable}" "$@" ;;
          esac
        }}
    """

    def run(text: str, place: Path) -> None:
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{calls}\n{text}"], cwd=place, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n\n{done.stdout[-4000:]}"

    while not address.exists():
        assert server.poll() is None, "the server of the commands ended"
        time.sleep(0.1)
    yield run
    server.terminate()
    server.wait()


def words(text: str) -> str:
    """`text` without its last comment and the spaces that align it."""
    return " ".join(re.sub(r"\s#[^'\"\n]*$", "", text).split())


def is_run_elsewhere(text: str) -> bool:
    """Whether a statement is in ELSEWHERE."""
    return any(fnmatch(words(text), pattern) for pattern in ELSEWHERE)


@pytest.fixture(scope="session")
def trained(bash: Bash, working_copy: Path) -> Path:
    """The working copy when `make quickstart` has been called, as far as two steps of training go."""
    planned = ["make", "--no-print-directory", "--dry-run", "--old-file=.venv/.installed", "quickstart"]
    lines = subprocess.run(planned, cwd=working_copy, check=True, capture_output=True, text=True).stdout
    assert lines.count(".venv/bin/python cli.py ") >= 3, lines
    bash(lines.replace(".venv/bin/python", "python"), working_copy)
    return working_copy


@pytest.fixture(scope="session")
def copies(trained: Path) -> Callable[[Path], Path]:
    """The working copy of a page, in which its earlier blocks have left what they make."""

    @cache
    def copy_of(page: Path) -> Path:
        return Path(shutil.copytree(trained, trained.parent / page.stem, symlinks=True))

    return copy_of


@pytest.fixture(scope="session")
def done() -> set[str]:
    """What has been run already: a span of code that repeats it is not run again."""
    return set()


def test_commands_run(script: Any, bash: Bash, copies: Callable[[Path], Path], done: set[str]) -> None:
    texts = [one.text for one in script.statements if not one.mark and not is_run_elsewhere(one.text)]
    if not texts or (len(texts) == 1 and words(texts[0]) in done):
        pytest.skip("nothing here that has not been run, or is not marked")
    bash("\n".join(texts), copies(script.page))
    done.update(map(words, texts))


def test_python_runs(page_of_code: Path, code: str, copies: Callable[[Path], Path]) -> None:
    program = NAMES.get(page_of_code.name, "") + code
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=copies(page_of_code), capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{program}\n\n{result.stderr[-4000:]}"
