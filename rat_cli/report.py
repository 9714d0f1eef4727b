"""What a run has learned: its validation beside n-grams that counted the very tokens it has seen, and a sample."""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from datamodules.baselines import ngram_baselines, trained_pairs, validation_pairs
from datamodules.tokenizer import load_tokenizer
from datamodules.tokens import TokenDataModule
from lightning_modules.event_files import read_scalars
from rat_cli.generate import load_model
from rat_cli.text_stream import decoded

CHECKPOINT = Path("checkpoints", "last.ckpt")
TOKENIZER = "tokenizer.json"


def report(run: Path, prompt: str = "Return the", max_new_tokens: int = 80, seed: int = 0) -> None:
    """Compare a finished run with n-grams, and print its speed, a sample and where its curves are.

    The n-grams count exactly the (input, target) pairs that the run was trained on, and predict exactly the ones it
    was validated on.

    Args:
        run: folder of the run, with config.yaml, checkpoints/last.ckpt and TensorBoard events.
        prompt: what the sample continues.
        max_new_tokens: length of the sample.
        seed: of the sample.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the run was not validated, or its data are none of TokenDataModule.
    """
    for name in (Path("config.yaml"), CHECKPOINT):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run / name} is missing: {run} is no folder of a run of cli.py fit")
    config = yaml.safe_load((run / "config.yaml").read_text())
    scalars = {tag: list(rows.value) for tag, rows in read_scalars(run).groupby("tag")}
    if "val/perplexity" not in scalars:
        raise ValueError(f"{run} was never validated: let it reach model.val_every_n_steps")
    data = _data_module(config, run)
    samples = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)["TokenDataModule"]
    seen = trained_pairs(data, samples["samples_in_all_epochs"])
    counted = ngram_baselines(seen, validation_pairs(data), data.vocab_size)
    rows = {
        "unigram": counted.unigram,
        "interpolated bigram": counted.bigram,
        f"{run.name} ({load_model(run / CHECKPOINT).num_parameters() / 1e6:.2f}M)": scalars["val/perplexity"][-1],
    }
    print(f"\n{'validation':<24}{'perplexity':>12}{'bits/byte':>12}")
    for name, perplexity in rows.items():
        bits = "" if data.val_bytes_per_token is None else f"{math.log2(perplexity) / data.val_bytes_per_token:.3f}"
        print(f"{name:<24}{perplexity:>12.2f}{bits:>12}")
    print(f"\ntrained on {len(seen.targets):,} tokens", end="")
    if rates := scalars.get("train/device/items_per_sec"):
        print(f", {statistics.median(rates):,.0f} tokens/s (median)", end="")
    print(f"\ncurves: tensorboard --logdir {run}\n\n{_sample(run, data, config, prompt, max_new_tokens, seed)}")


def _data_module(config: dict[str, Any], run: Path) -> TokenDataModule:
    """The run's data, with the global batch that decides where its epochs end."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TokenDataModule, "data")
    try:
        data = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
    except Exception as error:
        raise ValueError(f"{run / 'config.yaml'}: n-grams need the data of a TokenDataModule: {error}") from None
    accumulated = data.batch_size * config["trainer"]["accumulate_grad_batches"]
    data.global_batch_size = config["model"]["global_batch_size"] or accumulated
    return data


def _sample(
    run: Path, data: TokenDataModule, config: dict[str, Any], prompt: str, max_new_tokens: int, seed: int
) -> str:
    """The model's continuation of `prompt`, or why there is none."""
    folder = config["data"]["init_args"]["path"]
    if folder is None or not Path(folder, TOKENIZER).is_file():
        return f"no sample: there is no {TOKENIZER} beside the data"
    vocabulary = load_tokenizer(Path(folder, TOKENIZER))
    given = vocabulary.encode(prompt).ids
    generator = torch.Generator().manual_seed(seed)
    tokens = load_model(run / CHECKPOINT).generate(
        [given],
        max_new_tokens=max_new_tokens,
        temperature=0.8,
        top_p=0.95,
        eos_token_id=data.eos_id,
        generator=generator,
    )[0]
    return "sample: " + prompt + "".join(decoded(vocabulary, iter(tokens), after=given))
