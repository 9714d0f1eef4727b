"""Checkpoints and models in another form: for training, for this package, for transformers."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_modules.atomic import replacing
from lightning_modules.checkpoints import AtomicCheckpointIO
from lightning_modules.sharded_checkpoints import MODEL_CONFIG, PREFIX, write_folder
from rat import CausalLM, ModelConfig
from rat.checkpoint import CONFIG, check_weights
from rat.interop import hub
from rat_cli.model_forms import is_model, save_for_transformers, start_of_training

_TOKENIZER = "tokenizer.json"


def convert(
    checkpoint: Path,
    output: Path,
    to: Literal["file", "shards", "model", "huggingface"],
    tokenizer: Path | None = None,
    architecture: dict[str, Any] | None = None,
) -> None:
    """Turn a checkpoint of training or a model into another form, in one process, on the CPU, in memory as a whole.

    Training goes on from a file under the strategies ddp and single, from a file or shards under fsdp2. Every form
    has the shapes of one process, also of what was written under tensor parallelism. A model has no optimiser: as a
    file it is a checkpoint of step 0 with weights in fp32, which validate, test and predict take as --ckpt_path under
    any strategy, and fit under all but fsdp (model.init_from takes the model itself under all of them).

    Args:
        checkpoint: a .ckpt of training: one file, or a folder of shards as fsdp and fsdp2 write it. A folder is read
            with pickle, which can run code: take only those you trust. Or a model: a folder of ours or of
            transformers, a released .pth, or the name of one of them on the Hugging Face hub.
        output: where to put it; it must not exist.
        to: file: one file; shards: a folder of shards, optimiser included in both; model: model.safetensors and
            config.json for `CausalLM.from_pretrained`, `generate` and `model.init_from`; huggingface: the same for
            transformers, with the code, so that it loads where this package is not installed.
        tokenizer: a tokenizer.json to put beside a model. Default: the one in or beside the checkpoint, if there is
            one.
        architecture: what a released .pth does not tell of its own, such as {"chunk_size": 16}.

    Raises:
        FileNotFoundError: there is no checkpoint, or no tokenizer.
        FileExistsError: there is something at output.
        ValueError: the checkpoint is damaged, incomplete, or of another kind.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another --output")
    if tokenizer is not None and to in ("file", "shards"):
        raise ValueError(f"--tokenizer goes beside a model, and --to is {to}: leave it out")
    if not checkpoint.exists() and hub.could_be_on_the_hub(checkpoint):
        checkpoint = hub.download(checkpoint)
    tokenizer = tokenizer or _tokenizer_of(checkpoint)
    if tokenizer is not None and not tokenizer.is_file():
        raise FileNotFoundError(f"there is no tokenizer {tokenizer}")
    content, model = _read(checkpoint, to, architecture)
    if to == "shards" and not content.get("optimizer_states"):
        raise ValueError(f"{checkpoint} has no optimiser to be put into shards: take --to file")
    if to == "file":
        AtomicCheckpointIO().save_checkpoint(content, output)
        return
    with replacing(output) as partial:
        if to == "shards":
            write_folder(content, partial, [PREFIX + name for name, _ in model.named_parameters()])
        elif to == "huggingface":
            save_for_transformers(model, partial, tokenizer)
        else:
            model.save_pretrained(partial)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, partial / _TOKENIZER)


def _tokenizer_of(checkpoint: Path) -> Path | None:
    places = (checkpoint / _TOKENIZER, checkpoint.parent / _TOKENIZER)
    return next((place for place in places if place.is_file()), None)


def _read(checkpoint: Path, to: str, architecture: dict[str, Any] | None) -> tuple[dict[str, Any], CausalLM]:
    """The checkpoint of training, from a model only where it is wanted, and the model."""
    if is_model(checkpoint):
        model = CausalLM.from_pretrained(checkpoint, architecture)
        return {} if to in ("model", "huggingface") else start_of_training(model), model
    if architecture is not None:
        raise ValueError(f"--architecture is for a released .pth, and {checkpoint} tells its own: leave it out")
    content = read_checkpoint(checkpoint)
    return content, model_of(content, checkpoint)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of training, a file or a folder of shards, on the CPU.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, incomplete, or not of `cli.py fit`.
    """
    if (path / CONFIG).is_file():
        raise ValueError(f"{path} is a model already, and holds no state of training: give a .ckpt")
    content = AtomicCheckpointIO().load_checkpoint(path, "cpu", weights_only=True)
    if MODEL_CONFIG not in content:
        raise ValueError(f"{path} was not written by cli.py fit: it holds no {MODEL_CONFIG}")
    return content


def model_of(content: dict[str, Any], source: Path) -> CausalLM:
    """The model in what `read_checkpoint` gave of `source`. Raises ValueError if weights and config do not fit."""
    config = ModelConfig.from_dict(content[MODEL_CONFIG], str(source))
    weights = {name.removeprefix(PREFIX): x for name, x in content["state_dict"].items() if name.startswith(PREFIX)}
    with torch.device("meta"):
        model = CausalLM(config)
    check_weights({name: x.shape for name, x in model.state_dict().items()}, weights, str(source))
    model.load_state_dict(weights, assign=True)
    return model
