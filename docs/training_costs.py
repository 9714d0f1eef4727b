"""Print the tables of docs/training.md: memory on 16 GPUs, and what the paper's runs cost. Four minutes.

python docs/training_costs.py [configs/experiment/fineweb_edu/rat-xl.yaml ...]
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rat.markdown import header, line
from rat_cli.info import PARTS, InfoCLI, gpu_hours
from rat_cli.plan import GB, Plan, read_plan

FOLDER = Path(__file__).parents[1] / "configs" / "experiment" / "fineweb_edu"
EXPERIMENTS = sorted(path for path in FOLDER.glob("*-xl.yaml") if path.name != "base-xl.yaml")
DEVICES, MEMORY_GB = 16, 80.0
PEAK_TFLOPS, MFU = 989.0, 0.4


def plans(path: Path) -> Iterator[Plan]:
    """An experiment under ddp and fsdp2, with blocks' activations kept and computed again."""
    for strategy in ("ddp", "fsdp2"):
        config = InfoCLI(["--config", str(path), "--strategy", strategy]).config
        plan = read_plan(config, devices=DEVICES)
        for checkpointing in (False, True):
            yield replace(plan, step=replace(plan.step, checkpointing=checkpointing))


def memory_row(path: Path, plan: Plan) -> str:
    """One line of the first table."""
    memory = plan.memory()
    batch, largest = plan.largest_batch(MEMORY_GB)
    parts = [f"{getattr(memory, part) / GB:.2f}" for part in PARTS]
    again = "yes" if plan.step.checkpointing else "no"
    cells = [path.stem, plan.strategy, again, *parts, f"**{memory.total / GB:.1f}**"]
    return line(*cells, f"{batch} ({largest.total / GB:.1f})", plan.global_batch_size // batch // DEVICES)


def cost_row(path: Path) -> str:
    """One line of the second table."""
    plan = read_plan(InfoCLI(["--config", str(path)]).config)
    flops = plan.flops()
    if flops is None:
        raise ValueError(f"{path} does not say how many steps it takes")
    hours = gpu_hours(flops, PEAK_TFLOPS, MFU)
    return line(path.stem, f"{flops:.3g}", f"{hours:,.0f}", f"{hours / DEVICES:.0f}")


def main(paths: Sequence[Path]) -> None:
    """Print both tables."""
    head = ["experiment", "strategy", "recomputed", *PARTS.values(), "together"]
    head += [f"largest micro batch in {MEMORY_GB:g} GB (takes)", "accumulated"]
    print(f"GB of each of {DEVICES} GPUs with micro batches of the config, by part:\n")
    print(*header(*head), sep="\n")
    for path in paths:
        for plan in plans(path):
            print(memory_row(path, plan), flush=True)
    head = ["experiment", "FLOPs", "GPU-hours", f"hours on {DEVICES}"]
    print(f"\nIf {MFU:.0%} of {PEAK_TFLOPS:g} TFLOP/s are reached (an assumption):\n")
    print(*header(*head), sep="\n")
    for path in paths:
        print(cost_row(path), flush=True)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or EXPERIMENTS)
