"""What figures come from: the machine they were measured on, and the code they were measured with."""

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[2]


def machine(device: torch.device) -> str:
    """What the figures were measured on, in a line."""
    facts = machine_facts(device)
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    return f"{facts['processor']}{threads}, torch {facts['torch']}"


def machine_facts(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on."""
    facts: dict[str, str | int] = {"device": str(device), "python": platform.python_version()}
    facts |= {"torch": torch.__version__, "system": f"{platform.system()} {platform.machine()}"}
    if device.type == "cuda":
        return facts | {"processor": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return facts | {"processor": f"{_processor()} CPU", "threads": torch.get_num_threads()}


def _processor() -> str:
    """The name that the system gives the CPU."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def code_version() -> dict[str, str | bool | None]:
    """`package`: the version installed; `commit` and `dirty`: of the git checkout, None where it is none.

    What differs in docs/ alone, such as the tables of a sweep that grow with its runs, makes nothing dirty.
    """
    try:
        package = version("rat-lab")
    except PackageNotFoundError:
        package = None
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs")
    return {
        "package": package,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def _git(*arguments: str) -> str | None:
    if not (_ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", _ROOT, *arguments], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
