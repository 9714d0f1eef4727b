"""Which command runs, its help, and that light ones stay light."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.bad_steps import BadStepError
from rat_cli import main as module
from rat_cli.main import COMMANDS

Cli = Callable[..., Any]
ROOT = Path(module.__file__).parents[1]


def test_help_lists_every_command_and_what_it_is_for(cli: Cli) -> None:
    for arguments in (["--help"], ["-h"]):
        result = cli(*arguments)
        assert (result.code, result.err) == (0, "")
        for name, command in COMMANDS.items():
            assert f"  {name}" in result.out
            assert command.purpose in result.out


def test_no_command_is_answered_with_help(cli: Cli) -> None:
    result = cli()
    assert result.code == 2
    assert "usage:" in result.out


@pytest.mark.parametrize(
    ("name", "meant"), [("fti", "fit"), ("validat", "validate"), ("bench layr", "bench layer"), ("generat", "generate")]
)
def test_an_unknown_command_suggests_one(cli: Cli, name: str, meant: str) -> None:
    result = cli(*name.split())
    assert result.code == 2
    assert result.err.startswith(f"error: there is no command '{name}', did you mean '{meant}'? choose one of fit, ")


def test_a_command_may_have_others_below_it(cli: Cli) -> None:
    assert "only so many documents of each task" in " ".join(cli("evaluate", "--help").out.split())
    assert "only so many documents" not in " ".join(cli("evaluate", "lengths", "--help").out.split())
    assert "nothing to evaluate" in cli("evaluate", "--checkpoint", "x", "--output", "y").err


@pytest.mark.parametrize(("arguments", "code"), [(["bench"], 2), (["prepare", "--help"], 0), (["data", "--path"], 2)])
def test_a_group_of_commands_lists_its_own(cli: Cli, arguments: list[str], code: int) -> None:
    result = cli(*arguments)
    assert result.code == code
    names = [line.split()[0] for line in result.out.splitlines() if line.startswith("  ")]
    assert set(names) == {arguments[0]}


# a line of each docstring that only its options can show
EXPLAINED = {
    "fit": "sequences of an optimiser step, over all devices",
    "validate": "which implementation of `rat.ops` runs",
    "test": "which implementation of `rat.ops` runs",
    "predict": "which implementation of `rat.ops` runs",
    "prepare pretrain": "share of the documents kept for validation",
    "report": "what the sample continues",
    "generate": "above 1 discourages tokens",
    "evaluate": "only so many documents of each task",
    "info": "lengths to tell costs at",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_explains_its_options(cli: Cli, name: str) -> None:
    result = cli(*name.split(), "--help")
    assert (result.code, result.err) == (0, "")
    assert "usage:" in result.out
    assert EXPLAINED.get(name, "--") in " ".join(result.out.split())


@pytest.mark.parametrize("ask", ["--compile-only", "--compile_only", "--compile-only=true"])
def test_switches_need_no_value(cli: Cli, ask: str) -> None:
    result = cli("bench", "kernels", ask, "--archs", "[75]")
    assert (result.code, result.err) == (1, "error: unknown compute capability 75: choose from 80, 90, 100\n")
    assert cli("bench", "kernels", "--archs", "[75]", ask).err == result.err
    assert "there is no GPU here" in cli("bench", "kernels", "--compile-only", "false", "--archs", "[75]").err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would check and time all kernels")
def test_a_command_needs_no_option(cli: Cli) -> None:
    assert "there is no GPU here" in cli("bench", "kernels").err


@pytest.mark.parametrize("arguments", [["--help"], ["fti"], []])
def test_light_commands_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys, rat_cli.main as m\n"
        "try: m.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} were imported' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_is_no_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_run", stopped)
    result = cli("fit")
    assert (result.code, result.err) == (130, "error: interrupted\n")


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "LOCAL_RANK"])
def test_what_is_so_on_all_ranks_is_told_once(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(error: BaseException, *_: object) -> None:
        raise error

    errors = [BadStepError("step 7: the loss is nan"), KeyboardInterrupt(), FileNotFoundError("no data here")]
    told = []
    for other in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(other, raising=False)
    for rank in (0, 1):
        monkeypatch.setenv(name, str(rank))
        for error in errors:
            monkeypatch.setattr(module, "_run", partial(fail, error))
            told.append(cli("fit")[::2])
    assert told == [
        (1, "error: step 7: the loss is nan\n"), (130, "error: interrupted\n"), (1, "error: no data here\n"),
        (1, ""), (130, ""), (1, "error: no data here (rank 1)\n"),
    ]  # fmt: skip


def test_what_is_no_fault_of_the_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(module, "_run", broken)
    with pytest.raises(KeyError, match="a bug"):
        module.main(["fit"])
