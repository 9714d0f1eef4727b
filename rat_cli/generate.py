"""Text from a trained model."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from datamodules.tokenizer import FILE_NAME as TOKENIZER
from datamodules.tokenizer import end_of_text_id, load_tokenizer
from lightning_modules.atomic import standing
from rat import CausalLM
from rat.generation import Sampling
from rat.interop import hub
from rat.ops.backend import Backend, describe_backend, set_backend
from rat.session import Session, model_identity
from rat_cli.conversation import Conversation, encoded
from rat_cli.convert import model_of, read_checkpoint
from rat_cli.prompts import Results, Row, read_prompts
from rat_cli.text_stream import decoded


def generate(
    checkpoint: Path,
    prompt: list[str] | str | None = None,
    prompts_file: Path | None = None,
    interactive: bool = False,
    output: Path | None = None,
    load_state: Path | None = None,
    save_state: Path | None = None,
    tokenizer: Path | None = None,
    architecture: dict[str, Any] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    repetition_penalty: float = 1.0,
    stop_at_end_of_text: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "cpu",
    kernel_backend: Backend = "auto",
) -> None:
    """Continue prompts with a trained model; a single one is printed as it comes.

    Args:
        checkpoint: a folder of save_pretrained, a .ckpt of training (a file, or a folder of shards), or a .pth of the
            paper's code.
        prompt: a text to continue, or several: '["one", "another"]'.
        prompts_file: a text file with a prompt on each line, or a .jsonl with a row {"prompt": TEXT, ...} on each.
        interactive: answer line by line from the terminal; all turns are one text, of which nothing is read twice.
        output: a .jsonl for the answers, a row for each prompt in their order: what the prompt's row holds, and
            "completion". A call that was interrupted is gone on with by the same call.
        load_state: a file of --save_state: prompts go on the text in it, which is not read again.
        save_state: where to keep the text, and what the model remembers of it, when the command ends. With
            --max_new_tokens 0 that is the prompt alone, for any number of calls to go on.
        tokenizer: a tokenizer.json, or a folder that holds one. Default: the one in the checkpoint's folder, or beside
            the data that config.yaml in the run's folder names.
        architecture: what a .pth does not tell of its model: '{num_heads: 16, chunk_size: 16}'.
        max_new_tokens: at most so many for each prompt.
        temperature: 0 always takes the likeliest token; 1 draws as the model predicts.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that reach this probability together.
        repetition_penalty: above 1 discourages tokens that were there before.
        stop_at_end_of_text: end where the model ends its document.
        batch_size: prompts that are continued side by side.
        seed: of the draws; the same with the same batch_size gives the same text.
        device: cpu, cuda or cuda:N.
        kernel_backend: which implementation of `rat.ops` runs; auto takes the fastest that the device can.

    Raises:
        FileNotFoundError: no such checkpoint, prompts, tokenizer or state.
        FileExistsError: there is something at output.
        ValueError: no prompt, an empty one, options or files that do not fit each other, the state of another model,
            no such device, or a backend that it cannot run.
    """
    check_device(device)
    describe_backend(kernel_backend, torch.device(device), training=False)
    set_backend(kernel_backend)
    rows = _rows(prompt, prompts_file)
    side_by_side = output is not None or len(rows) > 1
    _check(rows, side_by_side, interactive, load_state, save_state, batch_size)
    vocabulary = load_tokenizer(tokenizer_beside(checkpoint) if tokenizer is None else tokenizer)
    model = load_model(checkpoint, architecture).to(device).eval()
    if vocabulary.get_vocab_size() > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocabulary.get_vocab_size()} tokens, {checkpoint} only {model.config.vocab_size}:"
            " give the --tokenizer that its data was prepared with"
        )
    conversation = Conversation(
        Session(model) if load_state is None else Session.load(load_state, model),
        vocabulary,
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty),
        max_new_tokens,
        end_of_text_id(vocabulary) if stop_at_end_of_text else None,
        torch.Generator(device).manual_seed(seed),
    )
    if side_by_side:
        _answer_all(conversation, rows, output, batch_size, seed)
        return
    for row in rows:
        conversation.say(row["prompt"])
        _note_length(len(conversation.session.tokens), model)
        print(row["prompt"], end="", flush=True)
    if rows or not interactive:
        conversation.answer()
    if interactive:
        conversation.converse()
    if save_state is not None:
        conversation.session.save(save_state)
        print(f"{len(conversation.session.tokens):,} tokens and their state: {save_state}", file=sys.stderr)


def _rows(prompt: list[str] | str | None, file: Path | None) -> list[Row]:
    texts = [prompt] if isinstance(prompt, str) else [*(prompt or [])]
    if not all(texts):
        raise ValueError("a prompt is empty: every one needs some text")
    return [{"prompt": text} for text in texts] + (read_prompts(file) if file else [])


def _check(
    rows: list[Row],
    side_by_side: bool,
    interactive: bool,
    load_state: Path | None,
    save_state: Path | None,
    batch_size: int,
) -> None:
    """Refuse options that do not fit each other."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not rows and (side_by_side or (not interactive and load_state is None)):
        raise ValueError("nothing to continue: give --prompt 'Some text', --prompts_file FILE or --interactive")
    if side_by_side and interactive:
        raise ValueError("--interactive is about one text: give one --prompt at most, and no --output")
    if side_by_side and save_state is not None:
        raise ValueError("--save_state keeps one text: give one --prompt, and no --output")


def _answer_all(conversation: Conversation, rows: list[Row], output: Path | None, batch_size: int, seed: int) -> None:
    """Continue every prompt after the session's text: into `output`, or print it with its continuation."""
    session, vocabulary, generator = conversation.session, conversation.vocabulary, conversation.generator
    session.read()
    prompts = [encoded(vocabulary, row["prompt"], behind=bool(session.tokens)) for row in rows]
    _note_length(len(session.tokens) + max(map(len, prompts)), session.model)
    settings = {"max_new_tokens": conversation.max_new_tokens, "eos_token_id": conversation.eos_token_id}
    settings |= vars(conversation.sampling)
    results, done = None, 0
    if output is not None:
        made_with = settings | {"model": model_identity(session.model), "seed": seed, "batch_size": batch_size}
        made_with |= {"prompts": _fingerprint([rows, prompts]), "text_before": _fingerprint(session.tokens)}
        results = Results(output, made_with, batch_size)
        done = results.done
    bar = tqdm(total=len(rows), initial=done, desc="generating", unit="prompt", disable=results is None)
    for start in range(done, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        generator.manual_seed(seed + start)  # whichever were made before
        found = session.model.generate(
            prompts[batch], past=session if session.tokens else None, generator=generator, **settings
        )
        answers = [
            row | {"completion": "".join(decoded(vocabulary, iter(tokens), after=before))}
            for row, tokens, before in zip(rows[batch], found, prompts[batch], strict=True)
        ]
        if results is None:
            print("".join(f"{row['prompt']}{row['completion']}\n\n" for row in answers), end="", flush=True)
        else:
            results.append(answers)
        bar.update(len(answers))
    bar.close()
    if results is not None:
        results.finish()
        print(f"{len(rows):,} answers: {output}")


def _note_length(length: int, model: CausalLM) -> None:
    if length > model.config.max_seq_len:
        print(
            f"note: a text of {length:,} tokens is longer than those of training ({model.config.max_seq_len:,}); no"
            " model here has a longest input, but how well it does beyond is for `evaluate lengths` to tell",
            file=sys.stderr,
        )


def _fingerprint(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


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


def check_device(device: str) -> None:
    """Raise ValueError where there is no such device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"there is no device {device!r} here: give cpu, cuda or cuda:N")


def tokenizer_beside(checkpoint: Path) -> Path:
    """The folder that holds a checkpoint's tokenizer: its own, or that of the data which the config of its run names.

    Raises:
        FileNotFoundError: the one or the other is missing.
    """
    if not standing(checkpoint).exists():
        if not hub.could_be_on_the_hub(checkpoint):
            raise FileNotFoundError(f"there is no checkpoint {checkpoint}")
        checkpoint = hub.download(checkpoint)
    folder = checkpoint.parent if checkpoint.is_file() or checkpoint.suffix == ".ckpt" else checkpoint
    places = [folder, *_data_of(folder), *_data_of(folder.parent)]
    for place in places:
        if (place / TOKENIZER).is_file():
            return place
    raise FileNotFoundError(f"no {TOKENIZER} in {', '.join(map(str, places))}: give --tokenizer FILE")


def _data_of(run: Path) -> list[Path]:
    """The folder of data that a run was trained on, if this is the folder of a run that says so."""
    config = run / "config.yaml"
    data = (yaml.safe_load(config.read_text()) or {}).get("data") if config.is_file() else None
    told = (data or {}).get("init_args", {})
    if path := told.get("path"):
        return [Path(path)]
    return [Path(told[name]).parent for name in ("train_path", "val_path") if told.get(name)]
