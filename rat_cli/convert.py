"""Checkpoints in another form: one file, a folder of shards, or a model alone."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_modules.atomic import replacing
from lightning_modules.checkpoints import AtomicCheckpointIO
from lightning_modules.sharded_checkpoints import write_folder
from rat import CausalLM, ModelConfig
from rat.checkpoint import CONFIG, check_weights

# Where the model stands in a checkpoint of Lightning.
_PREFIX = "model."
_TOKENIZER = "tokenizer.json"


def convert(
    checkpoint: Path, output: Path, to: Literal["file", "shards", "model"], tokenizer: Path | None = None
) -> None:
    """Turn a checkpoint of training into another form, in one process, on the CPU; all of it has to fit into memory.

    Training goes on from a file under the strategies ddp and single, from a file or shards under fsdp2.

    Args:
        checkpoint: a .ckpt of training: one file, or a folder of shards as fsdp and fsdp2 write it. A folder is read
            with pickle, which can run code: take only those you trust.
        output: where to put it; it must not exist.
        to: file: one file; shards: a folder of shards, optimiser included in both; model: model.safetensors and
            config.json for `CausalLM.from_pretrained`, `generate` and `model.init_from`.
        tokenizer: a tokenizer.json to put beside a model. Default: the one beside the checkpoint, if there is one.

    Raises:
        FileNotFoundError: there is no checkpoint, or no tokenizer.
        FileExistsError: there is something at output.
        ValueError: the checkpoint is damaged, incomplete, or of another kind.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another --output")
    if tokenizer is not None and to != "model":
        raise ValueError(f"--tokenizer goes beside a model, and --to is {to}: leave it out")
    beside = checkpoint.parent / _TOKENIZER
    tokenizer = tokenizer or (beside if beside.is_file() else None)
    if tokenizer is not None and not tokenizer.is_file():
        raise FileNotFoundError(f"there is no tokenizer {tokenizer}")
    content = read_checkpoint(checkpoint)
    if to == "file":
        AtomicCheckpointIO().save_checkpoint(content, output)
        return
    model = model_of(content, checkpoint)
    with replacing(output) as partial:
        if to == "shards":
            names = [_PREFIX + name for name, _ in model.named_parameters()]
            write_folder(content, partial, names)
        else:
            model.save_pretrained(partial)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, partial / _TOKENIZER)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of training, a file or a folder of shards, on the CPU.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, incomplete, or not of `cli.py fit`.
    """
    if (path / CONFIG).is_file():
        raise ValueError(f"{path} is a model already, and holds no state of training: give a .ckpt")
    content = AtomicCheckpointIO().load_checkpoint(path, "cpu", weights_only=True)
    if "model_config" not in content:
        raise ValueError(f"{path} was not written by cli.py fit: it holds no model_config")
    return content


def model_of(content: dict[str, Any], source: Path) -> CausalLM:
    """The model in what `read_checkpoint` gave of `source`. Raises ValueError if weights and config do not fit."""
    config = ModelConfig.from_dict(content["model_config"], str(source))
    weights = {name.removeprefix(_PREFIX): x for name, x in content["state_dict"].items() if name.startswith(_PREFIX)}
    with torch.device("meta"):
        model = CausalLM(config)
    check_weights({name: x.shape for name, x in model.state_dict().items()}, weights, str(source))
    model.load_state_dict(weights, assign=True)
    return model
