"""Models on disk: a folder with `model.safetensors` and `config.json`, or a checkpoint of the released code.

transformers reads the folder, too: see `rat.interop.huggingface`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rat.config import MODEL_TYPE, ModelConfig
from rat.interop import hub, released
from rat.interop.hub import CONFIG, SHARDS, WEIGHTS


class Pretrained(nn.Module):
    """Saving and loading for a model that is made from a `ModelConfig`."""

    config: ModelConfig

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `model.safetensors` and `config.json`, each of which a reader sees whole, old or new."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: x.detach().contiguous() for name, x in self.state_dict().items()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
            save_file(weights, Path(unfinished, WEIGHTS), metadata={"format": "pt"})
            told = {"model_type": MODEL_TYPE} | self.config.to_dict()
            Path(unfinished, CONFIG).write_text(json.dumps(told, indent=2) + "\n")
            # safetensors lets nobody but the writer read its file
            shutil.copymode(Path(unfinished, CONFIG), Path(unfinished, WEIGHTS))
            for name in (CONFIG, WEIGHTS):
                Path(unfinished, name).replace(folder / name)
        return folder

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], config: ModelConfig | Mapping[str, Any] | None = None
    ) -> Self:
        """The model that `save_pretrained` or the released code of the paper wrote.

        Args:
            path: a folder of `save_pretrained`, ours or that of transformers for our model, or a `.pth` file of the
                released code; here, or by its name on the Hugging Face hub. No code in it is run.
            config: what the file is expected to be; for a released file it may also be just the fields that the
                file does not tell, such as {"chunk_size": 16}.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a tensor is missing, is extra or has another shape; the file is damaged or holds objects
                other than plain data and tensors; the architecture is not told; it is not the one given.
        """
        path = Path(path)
        if not path.exists() and hub.could_be_on_the_hub(path):
            path = hub.download(path)
        if path.is_dir():
            if config is not None and not isinstance(config, ModelConfig):
                raise ValueError(
                    f"{path} has its own {CONFIG}: give a whole ModelConfig to compare it with, or nothing"
                )
            saved, weights = _read_folder(path)
            if config is not None and (changed := saved.differences(config)):
                raise ValueError(f"{path} holds another model: {changed}")
        elif path.is_file():
            saved, weights = released.read(path, config)
        else:
            raise FileNotFoundError(f"no model at {path}: neither a folder with {CONFIG} nor a .pth file")
        with torch.device("meta"):
            model = cls(saved)  # type: ignore[call-arg]
        check_weights({n: p.shape for n, p in model.state_dict().items()}, weights, str(path))
        model.load_state_dict(weights, assign=True)
        return model


def check_weights(expected: Mapping[str, torch.Size], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise one ValueError that names every tensor that is missing, extra or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not part of this model" for name in weights if name not in expected]
    for name, shape in expected.items():
        if name in weights and weights[name].shape != shape:
            problems.append(f"{name} is {tuple(weights[name].shape)}, this model's is {tuple(shape)}")
        elif name in weights and not weights[name].is_floating_point():
            problems.append(f"{name} holds {weights[name].dtype}, no floating-point numbers")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"{source} does not fit the model: " + "; ".join(problems[:8]) + more)


def _read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    files = [folder / WEIGHTS]
    if (folder / SHARDS).is_file():
        files = sorted({folder / name for name in json.loads((folder / SHARDS).read_text())["weight_map"].values()})
    for file in (folder / CONFIG, *files):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {folder} is not a folder of save_pretrained")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except Exception as error:  # safetensors has its own exception type, which says what is broken
            raise ValueError(f"{file} cannot be read, copy it again: {error}") from None
    # transformers has the model inside another
    return ModelConfig.from_json(folder / CONFIG), {name.removeprefix("model."): x for name, x in weights.items()}
