"""Which command runs. Its code is imported only once it is chosen, so that light ones start at once."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """A command: where its function is, and what it is for. `None` stands for Lightning's own."""

    function: str | None
    purpose: str


COMMANDS = {
    "fit": Command(None, "train a model: fit --config FILE.yaml [--config FILE.yaml ...] [--ckpt_path last]"),
    "validate": Command(None, "loss, perplexity and bits per byte on the validation data"),
    "test": Command(None, "the same on the test data"),
    "predict": Command(None, "loss of every sequence; of a fine-tuning task, answers and their scores"),
    "prepare pretrain": Command("datamodules.pretraining:prepare_pretrain", "turn text into shards and a tokenizer"),
    "prepare merge": Command("datamodules.pretraining:merge", "put together what several workers have prepared"),
    "prepare sft": Command("datamodules.sft.prepare:prepare_sft", "turn a task into prompts and answers"),
    "data inspect": Command(
        "datamodules.inspection:inspect", "documents and statistics of shards, a picture of lengths"
    ),
    "data verify": Command("datamodules.inspection:verify", "compare shards with their checksums"),
    "sweep": Command("rat_cli.sweep:sweep", "train a grid of variants and seeds, resumed, and collect one table"),
    "report": Command("rat_cli.report:report", "a finished run beside n-grams: perplexity, speed, a sample"),
    "generate": Command("rat_cli.generate:generate", "continue prompts with a trained model"),
    "evaluate": Command("rat_cli.evaluate:evaluate", "commonsense, LongBench, RULER, fine-tuning, any of lm-eval"),
    "evaluate lengths": Command(
        "rat_cli.lengths:evaluate_lengths", "loss by position, beyond the T of training too, drawn"
    ),
    "convert": Command("rat_cli.convert:convert", "turn a checkpoint or model into another form: transformers, ..."),
    "info": Command("rat_cli.info:main", "parameters, FLOPs, cache bytes and memory of a config"),
    "bench layer": Command("rat.benchmarks.layer:layer_benchmark", "time layers: training, prefill, decoding; floors"),
    "bench memory": Command("rat.benchmarks.memory:memory_benchmark", "bytes of layers: kept, at most, in the cache"),
    "bench throughput": Command(
        "rat.benchmarks.throughput:throughput_benchmark", "tokens/s of models at the largest batch that fits"
    ),
    "bench kernels": Command(
        "rat.benchmarks.kernels:kernels_benchmark", "GPU kernels: check and time; --compile-only: without a GPU"
    ),
    "bench prepare": Command(
        "datamodules.prepare_benchmark:prepare_throughput", "tokens/s and memory of prepare pretrain"
    ),
    "bench loader": Command("datamodules.benchmark:loader_throughput", "tokens/s of the data loader"),
}


# Commands that fill large tensors again and again.
_COMPUTING = {
    "fit",
    "validate",
    "test",
    "predict",
    "generate",
    "evaluate",
    "evaluate lengths",
    "sweep",
    "bench layer",
    "bench throughput",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: without the program's name; default: those of the process.

    Raises:
        SystemExit: 0 after help, 1 where the input was at fault, 2 where the arguments were, 75 where training was told
            to stop and was saved, 130 after Ctrl-C.
    """
    if argv is None and sys.argv[1:2] in (["fit"], ["sweep"]):
        # They wait until training has begun, and can stop it where nothing is lost: lightning_modules.preemption.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(COMMANDS))
        sys.exit(0 if argv else 2)
    group = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if group and argv[0] not in COMMANDS and (len(argv) < 2 or argv[1].startswith("-")):
        print(_help(group))
        sys.exit(0 if argv[1:] in (["-h"], ["--help"]) else 2)
    name = " ".join(argv[:2])
    if not group or (argv[0] in COMMANDS and name not in COMMANDS):
        name = argv[0]
    if name not in COMMANDS:
        _stop(_unknown(name), code=2)
    args = argv[len(name.split()) :]
    try:
        _run(name, args)
    except BrokenPipeError:  # whoever reads has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _stop("interrupted", code=130, everywhere=True)
    except Exception as error:
        if not _is_the_users(error):
            raise
        _stop(str(error), code=1, everywhere=type(error).__name__ == "BadStepError")


def _run(name: str, args: list[str]) -> None:
    function = COMMANDS[name].function
    if name in _COMPUTING:
        from rat.allocator import keep_freed_memory

        keep_freed_memory()
    if function is None:
        from rat_cli.lightning import run

        run([name, *args])
    elif function == "rat_cli.info:main":
        _load(function)(args)
    else:
        result = _call(_load(function), name, args)
        if isinstance(result, dict):
            print("\n".join(f"{key:<30} {value:,.6g}" for key, value in result.items()))


def _call(function: Callable[..., object], name: str, args: list[str]) -> object:
    """`function` with the arguments that its signature asks for, from the command line and YAML files."""
    from rat_cli.config_files import ConfigFile, ConfigParser

    parser = ConfigParser(prog=f"cli.py {name}")
    parser.add_argument("--config", action=ConfigFile, help="YAML file with these options; later ones win")
    parser.add_function_arguments(function, as_group=False)
    given = parser.instantiate_classes(parser.parse_args(list(_spelled_out(args, function)))).as_dict()
    given.pop("config")
    return function(**given)


def _spelled_out(args: list[str], function: Callable[..., object]) -> Iterator[str]:
    """The arguments, with switches as the parser wants them: --compile-only becomes --compile_only=true."""
    switches = {
        f"--{name}" for name, parameter in signature(function).parameters.items() if parameter.annotation is bool
    }
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        given, equals, value = arg.partition("=")
        name = "--" + given[2:].replace("-", "_")
        if arg.startswith("--") and name in switches:
            yield name + (equals + value or "=true" * following.startswith("-"))
        else:
            yield arg


def _load(function: str) -> Callable[..., object]:
    module, _, attribute = function.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _help(names: Iterable[str]) -> str:
    lines = [f"  {name:<18}{COMMANDS[name].purpose}" for name in names]
    return "\n".join(["usage: python cli.py COMMAND [options]", "", *lines, "", "COMMAND --help tells its options."])


def _unknown(name: str) -> str:
    close = get_close_matches(name, COMMANDS, n=1)
    hint = f", did you mean '{close[0]}'?" if close else ":"
    return f"there is no command '{name}'{hint} choose one of {', '.join(COMMANDS)}"


def _is_the_users(error: Exception) -> bool:
    """Whether bad input is at fault: what our own code refuses on purpose, Lightning's misuse, missing files."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError):
        return True
    from datamodules.output_folder import FULL_DISK

    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    if type(error).__name__ == "MisconfigurationException":
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    root = Path(__file__).resolve().parent.parent
    raised_in = Path(frame.tb_frame.f_code.co_filename).resolve() if frame else root
    ours = raised_in.is_relative_to(root) and "site-packages" not in raised_in.parts
    no_such_checkpoint = raised_in.name == "checkpoint_connector.py"  # such as --ckpt_path best, where none was kept
    return isinstance(error, ValueError) and (ours or no_such_checkpoint)


def rank() -> int:
    """This process's number among those that torchrun, srun or Lightning have started; 0 where it is alone."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)


def _stop(message: str, code: int, everywhere: bool = False) -> NoReturn:
    """Say what is wrong and end; of what is so on all ranks rank 0 tells alone."""
    sys.stdout.flush()
    number = rank()
    if not (everywhere and number):
        print(f"error: {message}{f' (rank {number})' * bool(number)}", file=sys.stderr, flush=True)
    sys.exit(code)
