"""A trained model on the tasks of lm-eval: the tables of the paper."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from datamodules.tokenizer import end_of_text_id, load_tokenizer
from rat.config import MODEL_TYPE
from rat.evaluation.results import ResultFolder
from rat.evaluation.scoring import RatScorer, Scorer
from rat.evaluation.suites import jobs_of
from rat.interop import hub
from rat.ops.backend import Backend, describe_backend, set_backend
from rat_cli.generate import check_device, load_model, tokenizer_beside
from rat_cli.sft_tasks import SFT_TASKS


def evaluate(
    checkpoint: Path,
    output: Path,
    suite: list[str] | str | None = None,
    task: list[str] | str | None = None,
    data: Path | None = None,
    lengths: list[int] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    long_prompts: Literal["left", "middle", "refuse"] = "left",
    tokenizer: Path | None = None,
    architecture: dict[str, Any] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    kernel_backend: Backend = "auto",
) -> None:
    """Evaluate a model on suites and tasks, print the table, and keep it as JSON, Markdown and TensorBoard scalars.

    Called again, it goes on where it was.

    Args:
        checkpoint: a folder of save_pretrained, a .ckpt of training, a .pth of the paper's code, the folder of
            another model that the transformers library loads, or a name on the hub.
        output: folder of the results.
        suite: commonsense, longbench, ruler, sft (the fine-tuning tasks); or several: '[commonsense, ruler]'.
        task: any task, group or tag of lm-eval; sft_jsonl, for fine-tuning rows of your own in --data; or several.
        data: a folder with FOLDER/TASK/SPLIT.jsonl (or .parquet, .arrow) in the columns of the hub, such as
            FOLDER/piqa/validation.jsonl or FOLDER/sft_qmsum/test.jsonl; what is not there comes from the hub.
        lengths: tokens of RULER's prompts with their answers. Default: 4096.
        limit: only so many documents of each task, from its first.
        num_fewshot: examples before each document. Default: what the task says.
        batch_size: requests that go through the model side by side.
        max_length: tokens that may stand before the one predicted. Default: all that do; in LongBench and sft, what the
            model was trained on.
        long_prompts: what goes where a prompt with its answer exceeds max_length: its beginning (left), its middle
            (always so in LongBench and sft), or nothing, and it is refused.
        tokenizer: a tokenizer.json, or a folder that holds one. Default: the one in the checkpoint's folder.
        architecture: what a .pth does not tell of its model: '{num_heads: 16, chunk_size: 16}'.
        dtype: of the weights.
        device: cpu, cuda or cuda:N.
        kernel_backend: which implementation of `rat.ops` runs; auto takes the fastest that the device can.

    Raises:
        FileNotFoundError: no such checkpoint, tokenizer or data.
        ValueError: an unknown suite or task, one that needs the network where there is none, files that do not fit each
            other, an output folder of other settings, no such device, or lm-eval is not installed.
    """
    check_device(device)
    for name, number in {"limit": limit, "batch_size": batch_size, "max_length": max_length}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    jobs = jobs_of(_listed(suite), _listed(task), lengths or [4096])
    _need_lm_eval()
    from rat.evaluation.harness import RatLM
    from rat.evaluation.run import run_jobs
    from rat.evaluation.tasks import TaskLoader

    describe_backend(kernel_backend, torch.device(device), training=False)
    set_backend(kernel_backend)
    model, vocabulary, end, trained = _load(checkpoint, tokenizer, architecture, device, getattr(torch, dtype))
    if vocabulary.get_vocab_size() > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocabulary.get_vocab_size()} tokens, {checkpoint} only {model.vocab_size}:"
            " give the --tokenizer that its data was prepared with"
        )
    settings = {
        "checkpoint": str(checkpoint), "fingerprint": _fingerprint(_here(checkpoint)), "limit": limit, "dtype": dtype,
        "num_fewshot": num_fewshot, "max_length": max_length, "long_prompts": long_prompts,
        "tokenizer": hashlib.sha256(vocabulary.to_str().encode()).hexdigest(),
        "data": None if data is None else str(data),
    }  # fmt: skip
    lm = RatLM(model, vocabulary, end, batch_size, max_length, long_prompts, not isinstance(model, RatScorer))
    loader, results = TaskLoader(data, vocabulary, SFT_TASKS), ResultFolder(output, settings)
    print(run_jobs(lm, jobs, loader, results, limit, num_fewshot, trained))
    print(f"kept in {output}")


def _load(
    checkpoint: Path, tokenizer: Path | None, architecture: dict[str, Any] | None, device: str, dtype: torch.dtype
) -> tuple[Scorer, Tokenizer, int, int | None]:
    """Model, tokenizer, end of text, and the tokens that the model was trained on at a time, where that is known."""
    if not _of_transformers(checkpoint):
        vocabulary = load_tokenizer(tokenizer_beside(checkpoint) if tokenizer is None else tokenizer)
        model = load_model(checkpoint, architecture).to(device, dtype).eval()
        return RatScorer(model), vocabulary, end_of_text_id(vocabulary), model.config.max_seq_len
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rat.evaluation.transformers_scorer import TransformersScorer

    try:
        found = AutoTokenizer.from_pretrained(tokenizer or checkpoint)
        foreign = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"transformers loads no language model with its tokenizer from {checkpoint}: {error}"
        ) from None
    if found.eos_token_id is None:
        raise ValueError(f"the tokenizer of {checkpoint} names no end of text: give a --tokenizer that does")
    length = getattr(foreign.config, "max_position_embeddings", None)
    return TransformersScorer(foreign), found.backend_tokenizer, found.eos_token_id, length


def _of_transformers(checkpoint: Path) -> bool:
    config = _here(checkpoint) / hub.CONFIG
    return config.is_file() and json.loads(config.read_text()).get("model_type", MODEL_TYPE) != MODEL_TYPE


def _here(checkpoint: Path) -> Path:
    """Where a checkpoint's files are, those of the hub too."""
    if not checkpoint.exists() and hub.could_be_on_the_hub(checkpoint):
        return hub.download(checkpoint)
    return checkpoint


def _fingerprint(checkpoint: Path) -> str:
    """The sha256 of a checkpoint's files."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.rglob("*")) if checkpoint.is_dir() else [checkpoint]:
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _listed(names: list[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) else names or []


def _need_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("evaluation needs lm-eval: pip install 'rat-lab[eval]'") from None
