"""Every command of the pages can be parsed: its name, options and files are such that it would begin to run.

bash itself takes the statements apart, with nothing on its PATH, and tells each call that it would have made.
"""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rat_cli import info
from rat_cli.config_files import ConfigParser
from rat_cli.info import InfoCLI
from rat_cli.lightning import RatCLI
from rat_cli.main import COMMANDS, main
from rat_cli.plan import read_plan

ROOT = Path(__file__).parents[2]
LANGUAGES = {"bash", "python", "yaml", "json", "text", "math", "mermaid"}

RECORD = r"""
command_not_found_handle() { printf '%s\0' "$@" $'\x1e' >> "$calls"; }
calls=$1 PATH=/nonexistent
"""


class ParsedError(Exception):
    """The arguments were accepted; nothing has been done yet."""


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop where their arguments have been parsed; info where its plan has been made; sweep goes on."""
    go_on = ConfigParser.instantiate_classes

    def stop(*_: object, **__: object) -> NoReturn:
        raise ParsedError

    def stop_others(parser: ConfigParser, *given: Any, **named: Any) -> Any:
        return go_on(parser, *given, **named) if parser.prog == "cli.py sweep" else stop()

    monkeypatch.setattr(RatCLI, "instantiate_classes", stop)
    monkeypatch.setattr(ConfigParser, "instantiate_classes", stop_others)
    monkeypatch.setattr(info, "describe_model", stop)


def calls_of(text: str, folder: Path) -> list[list[str]]:
    """The words of every call that bash would make of `text`."""
    path = folder / "calls"
    subprocess.run(["bash", "-c", RECORD + text, "bash", str(path)], cwd=folder, capture_output=True, check=False)
    if not path.is_file():
        return []
    return [call.split("\0")[:-1] for call in path.read_text().split("\x1e\0")[:-1]]


def check_cli(words: list[str]) -> None:
    """`cli.py` accepts these words; a training they describe goes together."""
    if {"-h", "--help"} & set(words):
        words = [word for word in words if word not in ("-h", "--help")]
        assert not words or " ".join(words) in COMMANDS
        return
    if words[0] == "sweep":
        return main([*words, "--dry_run=true"])  # asks of every run whether fit would take it
    with pytest.raises(ParsedError):
        main(words)
    if words[0] == "fit":
        config = InfoCLI(words[1:]).config
        read_plan(config, config.batch_size, config.devices)


def check_job(words: list[str]) -> None:
    """The job script is there and hands on what the command behind it accepts."""
    wrapped = [word.removeprefix("--wrap=") for word in words if word.startswith("--wrap=")]
    wrapped += [words[i + 1] for i, word in enumerate(words) if word == "--wrap"]
    if wrapped:
        return check_call(shlex.split(wrapped[0]))
    (script,) = (word for word in words if word.endswith(".sbatch"))
    given = words[words.index(script) + 1 :]
    command = re.search(r"cli\.py (prepare pretrain|fit|sweep)", Path(script).read_text())
    assert command, f"{script} runs no command that is known here"
    if command[1] == "sweep":  # the script tells it what it asks Slurm for
        asked = re.findall(r"^#SBATCH --(nodes|ntasks-per-node)=(\d+)", Path(script).read_text(), re.MULTILINE)
        nodes, devices = (dict(asked)[name] for name in ("nodes", "ntasks-per-node"))
        given += ["--index=0", f"--num_nodes={nodes}", f"--devices={devices}"]
    return check_cli([*command[1].split(), *given])


def check_call(words: list[str]) -> None:
    """A call of this project is well formed; other programs are left to the tests that run them."""
    match words:
        case ["python", "cli.py", *rest]:
            check_cli(rest)
        case ["python", "-m", "pytest", path, *_]:
            assert Path(path).exists()
        case ["python", script, *_] if not script.startswith("-"):
            assert Path(script).is_file()
        case ["make", *targets]:
            known = re.findall(r"^([\w-]+):", Path("Makefile").read_text(), re.MULTILINE)
            assert {target for target in targets if "=" not in target} <= set(known)
        case ["sbatch", *rest]:
            check_job(rest)
        case ["torchrun", *rest]:
            check_cli(rest[rest.index("cli.py") + 1 :])


def test_commands_are_accepted(script: Any, stage: Path) -> None:
    for statement in script.statements:
        (stage / "calls").unlink(missing_ok=True)
        for words in calls_of(statement.text, stage):
            try:
                check_call(words)
            except SystemExit:
                pytest.fail(f"{statement.place}: refused: {shlex.join(words)}")


def test_no_command_hides(page: Path) -> None:
    text = page.read_text()
    blocks = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    assert {match[1] for match in blocks.finditer(text)} <= LANGUAGES, "blocks say what they are"
    rest = re.sub(r"`[^`\n]+(?:\n[^`\n]+)*`", "", blocks.sub("", text))
    hidden = re.search(r"python cli\.py|python -m|^ {4,}(?:\$ )?(?:python|make|pip|sbatch|torchrun) .*", rest, re.M)
    assert not hidden, f"{page.name}: a command stands neither in a bash block nor in a span of code: {hidden[0]}"
