"""Text from a trained model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders

from datamodules.tokenizer import end_of_text_id, load_tokenizer
from rat import CausalLM
from rat.ops.backend import Backend, describe_backend, set_backend
from rat_cli.convert import model_of, read_checkpoint


def generate(
    checkpoint: Path,
    prompt: list[str] | str | None = None,
    prompts_file: Path | None = None,
    tokenizer: Path | None = None,
    architecture: dict[str, Any] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    repetition_penalty: float = 1.0,
    stop_at_end_of_text: bool = True,
    seed: int = 0,
    device: str = "cpu",
    kernel_backend: Backend = "auto",
) -> None:
    """Continue prompts with a trained model; a single one is printed as it comes.

    Args:
        checkpoint: a folder of save_pretrained, a .ckpt of training, or a .pth of the paper's code.
        prompt: a text to continue, or several: '["one", "another"]'.
        prompts_file: a text file with a prompt on each line.
        tokenizer: a tokenizer.json, or a folder that holds one. Default: the one in the checkpoint's folder.
        architecture: what a .pth does not tell of its model: '{num_heads: 16, chunk_size: 16}'.
        max_new_tokens: at most so many for each prompt.
        temperature: 0 always takes the likeliest token; 1 draws as the model predicts.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that reach this probability together.
        repetition_penalty: above 1 discourages tokens that were there before.
        stop_at_end_of_text: end where the model ends its document.
        seed: of the draws.
        device: cpu, cuda or cuda:N.
        kernel_backend: which implementation of `rat.ops` runs; auto takes the fastest that the device can.

    Raises:
        FileNotFoundError: no such checkpoint, prompts or tokenizer.
        ValueError: no prompt, an empty one, files that do not fit each other, no such device, or a backend that it
            cannot run.
    """
    _check_device(device)
    describe_backend(kernel_backend, torch.device(device), training=False)
    set_backend(kernel_backend)
    texts = _prompts(prompt, prompts_file)
    vocabulary = load_tokenizer(_tokenizer_beside(checkpoint) if tokenizer is None else tokenizer)
    model = load_model(checkpoint, architecture).to(device).eval()
    if vocabulary.get_vocab_size() > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocabulary.get_vocab_size()} tokens, {checkpoint} only {model.config.vocab_size}:"
            " give the --tokenizer that its data was prepared with"
        )
    steps = model.stream(
        [vocabulary.encode(text, add_special_tokens=False).ids for text in texts],
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        repetition_penalty=repetition_penalty,
        eos_token_id=end_of_text_id(vocabulary) if stop_at_end_of_text else None,
        generator=torch.Generator(device).manual_seed(seed),
    )  # fmt: skip
    if len(texts) == 1:
        print(texts[0], end="", flush=True)
        for piece in decoded(vocabulary, (step[0] for step in steps)):
            print(piece, end="", flush=True)
        print()
        return
    rows = [list(row) for row in zip(*steps, strict=True)] or [[] for _ in texts]
    for text, row in zip(texts, rows, strict=True):
        print(text + "".join(decoded(vocabulary, iter(row))), end="\n\n")


def load_model(checkpoint: Path, architecture: dict[str, Any] | None = None) -> CausalLM:
    """The model of a folder of `save_pretrained`, a .ckpt of training, or a released .pth; nothing in it is run.

    Args:
        checkpoint: the folder or file.
        architecture: the fields of ModelConfig that a released file does not tell.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a checkpoint, or one whose weights do not fit its config.
    """
    if checkpoint.suffix != ".ckpt":
        return CausalLM.from_pretrained(checkpoint, architecture)
    if architecture:
        raise ValueError(f"{checkpoint} tells its architecture itself: --architecture is for a .pth")
    return model_of(read_checkpoint(checkpoint), checkpoint)


def decoded(vocabulary: Tokenizer, tokens: Iterator[int | None]) -> Iterator[str]:
    """The text of `tokens` piece by piece, whole characters only; the special ones and None are left out."""
    stream = decoders.DecodeStream(skip_special_tokens=True)
    for token in tokens:
        piece = None if token is None else stream.step(vocabulary, token)
        if piece:
            yield piece


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"there is no device {device!r} here: give cpu, cuda or cuda:N")


def _prompts(prompt: list[str] | str | None, file: Path | None) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else [*(prompt or [])]
    texts += file.read_text().splitlines() if file else []
    if not texts or not all(texts):
        raise ValueError(
            "a prompt is empty: every one needs some text"
            if texts
            else "nothing to continue: give --prompt 'Some text' or --prompts_file FILE"
        )
    return texts


def _tokenizer_beside(checkpoint: Path) -> Path:
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not checkpoint.exists():
        raise FileNotFoundError(f"there is no checkpoint {checkpoint}")
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json: give --tokenizer FILE")
    return folder
