"""What TensorBoard's event files of a run hold, as a table."""

from pathlib import Path

import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_scalars(run: Path) -> pd.DataFrame:
    """Every scalar that a run has logged.

    A run that was killed and went on from its last checkpoint has logged some steps twice: the later value counts.

    Args:
        run: folder with the event files of all its starts.

    Returns:
        Columns step, tag, value and wall_time (seconds since 1970), sorted by tag and step; no rows where nothing was
        logged.

    Raises:
        FileNotFoundError: the folder holds no event files.
    """
    if not any(run.glob("events.out.tfevents.*")):
        raise FileNotFoundError(f"{run} holds no event files of TensorBoard: is it the folder of a run of cli.py fit?")
    curves = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    curves.Reload()
    rows = [
        (event.step, tag, event.value, event.wall_time)
        for tag in curves.Tags()["scalars"]
        for event in curves.Scalars(tag)
    ]
    found = pd.DataFrame(rows, columns=["step", "tag", "value", "wall_time"]).sort_values("wall_time", kind="stable")
    return found.drop_duplicates(["tag", "step"], keep="last").sort_values(["tag", "step"], ignore_index=True)
