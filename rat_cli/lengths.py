"""Length generalisation: the loss by position, within and beyond the T of training, of one model or several."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.dataset import TokenDataset
from datamodules.shards import TokenShards
from datamodules.tokenizer import FILE_NAME, fingerprint
from lightning_modules.dashboard import unread
from rat import CausalLM, ModelConfig
from rat.evaluation.lengths import Span, loss_by_position, span, spans
from rat.markdown import header, line
from rat.ops.backend import Backend, describe_backend, set_backend
from rat_cli.generate import check_device, load_model

# Lengths to look at where none are given, in units of the longest T of training.
_BEYOND = (1, 2, 4)


class Curve(NamedTuple):
    """A model's loss: by position, and just before the end of texts of each length T, positions T / 2 + 1 to T."""

    config: ModelConfig
    positions: list[Span]
    lengths: dict[int, Span]


def evaluate_lengths(
    models: dict[str, Path] | Path,
    data: Path,
    lengths: list[int] | None = None,
    output: Path = Path("lengths"),
    windows: int = 64,
    batch_size: int = 8,
    per_octave: int = 4,
    device: str = "cpu",
    kernel_backend: Backend = "auto",
) -> None:
    """Measure the loss by position in texts that are longer than those a model was trained on; draw it.

    The texts are windows of the validation tokens, cut wherever the last one ended, as in training: documents follow
    each other in them, and later positions hold no other text than earlier ones. The model reads a window in pieces,
    with its state carried, so that the memory grows with the state alone.

    Args:
        models: a checkpoint as `generate` takes it, or several and what to call them:
            '{RoPE: runs/rope/model, NoPE: runs/nope/model}'.
        data: a prepared folder, whose val/ is read, or a folder of shards.
        lengths: in tokens. Default: 1, 2 and 4 times the T of training, the longest of all models.
        output: folder for lengths.json, lengths.md and lengths.png; what was there is replaced.
        windows: texts of the longest length, at most; spread evenly over the tokens.
        batch_size: windows that are read side by side.
        per_octave: points of the curve between a position and twice that position.
        device: cpu, cuda or cuda:N.
        kernel_backend: which implementation of `rat.ops` runs; auto takes the fastest that the device can.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: too few tokens for such a length, a model of another vocabulary or tokenizer than the tokens',
            arguments out of range, no such device, or a backend that it cannot run.
    """
    check_device(device)
    describe_backend(kernel_backend, torch.device(device), training=False)
    set_backend(kernel_backend)
    _check(lengths, windows=windows, batch_size=batch_size, per_octave=per_octave)
    named = models if isinstance(models, dict) else {models.name: models}
    if not named:
        raise ValueError("there is no model: give --models CHECKPOINT, or '{NAME: CHECKPOINT, ...}'")
    shards = TokenShards(data / "val" if (data / "val").is_dir() else data)
    loaded = {name: _load(checkpoint, shards) for name, checkpoint in named.items()}
    trained = max(model.config.max_seq_len for model in loaded.values())
    lengths = sorted(lengths or [times * trained for times in _BEYOND])
    tokens = _windows(shards, lengths[-1], windows)
    curves = {}
    for name, model in loaded.items():
        losses = _losses(name, model.to(device).eval(), tokens, batch_size, device)
        model.cpu()
        ends = {length: span(losses, length // 2 + 1, length) for length in lengths}
        curves[name] = Curve(model.config, spans(losses, per_octave), ends)
    output.mkdir(parents=True, exist_ok=True)
    facts = {"data": str(shards.path), "windows": len(tokens), "tokens": tokens[:, 1:].numel()}
    (output / "lengths.json").write_text(json.dumps(facts | {"models": _plain(named, curves)}, indent=1) + "\n")
    table = _table(curves, lengths)
    (output / "lengths.md").write_text(table)
    _draw(curves, f"{len(tokens)} windows of {shards.path}", output / "lengths.png")
    print(f"\nloss at the end of texts of so many tokens, positions T/2 + 1 to T, nats per token\n\n{table}")
    print(f"curves: {output / 'lengths.png'}, {output / 'lengths.json'}")


def _check(lengths: Sequence[int] | None, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if lengths is not None and (not lengths or min(lengths) < 2):
        raise ValueError(f"lengths must be at least 2 tokens each, got {list(lengths)}")


def _load(checkpoint: Path, shards: TokenShards) -> CausalLM:
    """The model, if it can be one of these tokens."""
    model, index = load_model(checkpoint), shards.index
    if index.vocab_size is not None and index.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{shards.path} has {index.vocab_size} token ids, {checkpoint} only {model.config.vocab_size}: give the"
            " data of its own tokenizer"
        )
    beside = checkpoint / FILE_NAME
    if beside.is_file() and index.tokenizer_sha256 not in (None, fingerprint(beside)):
        raise ValueError(f"{shards.path} was made with another tokenizer than {beside}: give data of that one")
    return model


def _windows(shards: TokenShards, length: int, windows: int) -> Tensor:
    """(N, length + 1) tokens."""
    dataset = TokenDataset(shards, length, eos_id=0)
    numbers = np.unique(np.linspace(0, len(dataset) - 1, min(windows, len(dataset))).round().astype(np.int64))
    return torch.from_numpy(dataset[numbers].astype(np.int64))


def _losses(name: str, model: CausalLM, tokens: Tensor, batch_size: int, device: str) -> Tensor:
    parts = []
    with tqdm(total=tokens[:, 1:].numel(), desc=name, unit="token", unit_scale=True) as bar:
        for batch in tokens.split(batch_size):
            parts.append(loss_by_position(model, batch.to(device)))
            bar.update(parts[-1].numel())
    return torch.cat(parts)


def _plain(named: dict[str, Path], curves: dict[str, Curve]) -> dict[str, Any]:
    return {
        name: {
            "checkpoint": str(named[name]),
            "config": curve.config.to_dict(),
            "positions": [entry._asdict() for entry in curve.positions],
            "lengths": {length: entry._asdict() for length, entry in curve.lengths.items()},
        }
        for name, curve in curves.items()
    }


def _table(curves: dict[str, Curve], lengths: Sequence[int]) -> str:
    """Markdown: a row for each model, a column for each length."""
    lines = [*header("model", "trained at T", "positions", *(f"T {length:,}" for length in lengths))]
    for name, (config, _, ends) in curves.items():
        positions = "none" if config.rope_base is None or "rope_base" in unread(config) else "RoPE"
        cells = [_cell(ends[length]) for length in lengths]
        lines.append(line(name, f"{config.max_seq_len:,}", positions, *cells))
    return "\n".join(lines) + "\n"


def _cell(entry: Span) -> str:
    return f"{entry.loss:.3f}" + ("" if entry.within is None else f" ± {entry.within:.3f}")


def _draw(curves: dict[str, Curve], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import pandas as pd

    from rat_cli import figures

    figures.use_style()
    fig, ax = plt.subplots(figsize=(8, 4.5))
    positions = pd.concat([pd.DataFrame(curve.positions).assign(variant=name) for name, curve in curves.items()])
    figures.by_position(ax, positions, sorted({curve.config.max_seq_len for curve in curves.values()}))
    ax.set_title(title)
    figures.legend_beside(ax)
    fig.savefig(path, dpi=150)
    plt.close(fig)
