"""What the command line itself tells TensorBoard of a run."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator


def test_the_config_is_a_text_of_every_start_and_of_fit_alone(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run" / "tiny"
    assert cli("fit", "--config", tiny).code == 0
    assert cli("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_steps", 4).code == 0
    assert cli("validate", "--config", tiny, "--ckpt_path", "last").code == 0
    events = EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")]
    told = [yaml.safe_load(textwrap.dedent(text)) for text in texts]
    assert [config["trainer"]["max_steps"] for config in told] == [2, 4]
    assert told[-1] == yaml.safe_load((run / "config.yaml").read_text())
