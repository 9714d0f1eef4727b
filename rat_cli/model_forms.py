"""A model on its way out of training and back: what is one, as transformers wants it, as Lightning starts from it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning

from datamodules.tokenizer import end_of_text_id, load_tokenizer
from lightning_modules.language_model import CODE_VERSION
from lightning_modules.sharded_checkpoints import MODEL_CONFIG, PREFIX
from rat import CausalLM
from rat.interop.hub import CONFIG


def is_model(path: Path) -> bool:
    """Whether this is a model, and not a checkpoint of training."""
    return (path / CONFIG).is_file() or path.suffix == ".pth"


def save_for_transformers(model: CausalLM, folder: Path, tokenizer: Path | None) -> None:
    """`rat.interop.huggingface.export` with the end of text of a tokenizer.json.

    Raises:
        ValueError: transformers is not installed, or the tokenizer is not the model's.
    """
    try:
        from rat.interop.huggingface.export import export
    except ImportError as error:
        raise ValueError(f"transformers and accelerate are needed: pip install 'rat-lab[hf]' ({error})") from None
    end_of_text = None
    if tokenizer is not None:
        vocabulary = load_tokenizer(tokenizer)
        end_of_text = vocabulary.id_to_token(end_of_text_id(vocabulary))
    export(model, folder, tokenizer, end_of_text)


def start_of_training(model: CausalLM) -> dict[str, Any]:
    """A checkpoint of Lightning from before the first step, with weights in fp32 and an optimiser that starts anew."""
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": {PREFIX + name: x.float() for name, x in model.state_dict().items()},
        "optimizer_states": [],
        "lr_schedulers": [],
        MODEL_CONFIG: model.config.to_dict(),
        CODE_VERSION: version("rat-lab"),
    }
