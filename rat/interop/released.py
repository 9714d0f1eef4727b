"""Checkpoints of the paper's released code: a pickle with the weights under `task` and their names there.

The file is read with weights_only semantics: tensors and plain containers, and `easydict.EasyDict`, which becomes a
plain mapping without the package. Anything else in it is refused before it is made.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rat.config import MixerName, ModelConfig

COMPILED = "_orig_mod."
HEAD = "head.lm_head.weight"

# Their name -> ours; {n} is the layer.
NAMES = {
    "embedding.wte.weight": "embedding.weight",
    "backbone.ln.weight": "norm.weight",
    "backbone.layers.{n}.seq_layer.input_norm.weight": "layers.{n}.mixer_norm.weight",
    "backbone.layers.{n}.seq_layer.in_proj.weight": "layers.{n}.mixer.in_proj.weight",
    "backbone.layers.{n}.seq_layer.gate_bias": "layers.{n}.mixer.gate_bias",
    "backbone.layers.{n}.seq_layer.out_proj.weight": "layers.{n}.mixer.out_proj.weight",
    "backbone.layers.{n}.hidden_layer.ln.weight": "layers.{n}.feed_forward_norm.weight",
    "backbone.layers.{n}.hidden_layer.fc1.weight": "layers.{n}.feed_forward.fc1.weight",
    "backbone.layers.{n}.hidden_layer.fc2.weight": "layers.{n}.feed_forward.fc2.weight",
}


def read(path: Path, config: ModelConfig | Mapping[str, Any] | None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the weights, under our names, of a released checkpoint.

    Args:
        path: the `.pth` file.
        config: the architecture; or the fields of it that the file does not tell; or None.

    Raises:
        ValueError: as in `CausalLM.from_pretrained`.
    """
    content = _load(path)
    weights = _rename(content["task"], path)
    if isinstance(config, ModelConfig):
        return config, weights
    return _infer(weights, content.get("config") or {}, dict(config or {}), path), weights


def rename(name: str) -> str:
    """Our name of a released parameter; unknown names stay as they are."""
    layer = re.fullmatch(r"(backbone\.layers\.)(\d+)(\..*)", name)
    if layer is None:
        return NAMES.get(name, name)
    pattern = NAMES.get(f"{layer[1]}{{n}}{layer[3]}")
    return pattern.format(n=layer[2]) if pattern else name


class _EasyDict(dict[str, Any]):
    """Stands in for easydict.EasyDict while unpickling: an ordered dict, whose attributes hold the same again."""

    def __new__(cls) -> Any:
        return OrderedDict()


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([(_EasyDict, "easydict.EasyDict")]):  # type: ignore[list-item]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to load the file without protection.
        reason = re.search(r"(?:WeightsUnpickler error:\s*|Trying to load )(.*)", str(error))
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain data, and none of it was run: "
            f"{reason[1] if reason else 'it cannot be unpickled'}"
        ) from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no PyTorch checkpoint, copy it again: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("task"), dict):
        keys = list(content)[:8] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no checkpoint of the released code: no weights under 'task', but {keys}")
    return content


def _rename(task: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    theirs = {name.removeprefix(COMPILED): x for name, x in task.items()}
    for name, x in theirs.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{path}: {name} is no tensor, but {type(x).__name__}")
    head, embedding = theirs.pop(HEAD, None), theirs.get("embedding.wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise ValueError(f"{path}: {HEAD} differs from embedding.wte.weight, but the head is tied to the embedding")
    return {rename(name): x for name, x in theirs.items()}


def _infer(weights: Mapping[str, Tensor], told: Mapping[str, Any], known: dict[str, Any], path: Path) -> ModelConfig:
    """The architecture from the shapes, the file's own config and the caller's fields, the last one winning."""
    embedding = weights.get("embedding.weight")
    layers = {int(m[1]) for name in weights if (m := re.match(r"layers\.(\d+)\.", name))}
    if embedding is None or embedding.ndim != 2 or layers != set(range(len(layers))) or not layers:
        raise ValueError(f"{path}: no embedding.wte.weight, or layers are missing, among {sorted(weights)[:8]} ...")
    vocab_size, d_model = embedding.shape
    cells = _cells(told)
    values: dict[str, Any] = {"vocab_size": vocab_size, "d_model": d_model, "num_layers": len(layers)}
    heads = {cell["d_head"] for cell in cells if "d_head" in cell}
    if len(heads) == 1 and d_model % (d_head := heads.pop()) == 0:
        values["num_heads"] = d_model // d_head
    values |= {key: cell[key] for cell in cells for key in ("chunk_size", "window_size") if key in cell}
    values |= known
    if (names := _pattern(weights, len(layers), cells)) is not None:
        values.setdefault("pattern", names)
    wide = [width for n in range(len(layers)) if (width := _projection_width(weights, n)) > 3 * d_model]
    if "num_heads" in values and wide:
        values.setdefault("num_groups", max(1, (wide[0] - 3 * d_model) * values["num_heads"] // (2 * d_model)))
    kinds = values.get("pattern", ())
    needed = {
        "num_heads": True,
        "pattern": True,
        "chunk_size": "rat" in kinds,
        "window_size": "sliding_window" in kinds,
    }
    if missing := [name for name, wanted in needed.items() if wanted and name not in values]:
        raise ValueError(
            f"{path} does not tell its {', '.join(missing)}: give them, as in "
            f"from_pretrained({path.name!r}, {{{', '.join(f'{name!r}: ...' for name in missing)}}})"
        )
    return ModelConfig.from_dict(values, str(path))


def _projection_width(weights: Mapping[str, Tensor], layer: int) -> int:
    """Rows of a layer's projection; 0 where it is missing or no matrix, which is told later, by its name."""
    projection = weights.get(f"layers.{layer}.mixer.in_proj.weight")
    return projection.shape[0] if projection is not None and projection.ndim == 2 else 0


def _cells(told: Any) -> list[dict[str, Any]]:
    """The sequence cells in the file's own config, wherever they stand."""

    def walk(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key.startswith("seq_cell") and isinstance(value, dict):
                    yield dict(value)
                else:
                    yield from walk(value)

    return list(walk(told))


def _pattern(weights: Mapping[str, Tensor], num_layers: int, cells: list[dict[str, Any]]) -> list[MixerName] | None:
    """What the layers are. Weights tell the gated ones; attention and its window look alike in them."""
    embedding = weights["embedding.weight"]
    plain: MixerName | None = None
    if any("window_size" in cell for cell in cells):
        plain = "sliding_window"
    elif cells:
        plain = "attention"
    names: list[MixerName | None] = []
    for n in range(num_layers):
        gated = f"layers.{n}.mixer.gate_bias" in weights
        names.append(("rnn" if _projection_width(weights, n) == 3 * embedding.shape[1] else "rat") if gated else plain)
    if "rat" in names or "rnn" in names:  # no published hybrid has a gated layer beside whole attention
        names = [name or "sliding_window" for name in names]
    elif plain == "sliding_window" and len(cells) > 1:
        names = [("attention", "sliding_window")[n % 2] for n in range(num_layers)]
    if any(name is None for name in names):
        return None
    period = next(p for p in range(1, num_layers + 1) if names == (names[:p] * num_layers)[:num_layers])
    return [name for name in names[:period] if name is not None]
