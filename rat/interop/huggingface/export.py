"""A folder that transformers loads, on a machine without this package as well."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, __version__
from transformers.utils import logging

from rat.interop.huggingface.carried_code import auto_map, carried_files
from rat.interop.huggingface.configuration import RATConfig
from rat.interop.huggingface.modeling import RATForCausalLM
from rat.model import CausalLM

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [rat]
---

A language model with the layers {pattern} ({parameters:,} parameters; RAT: arXiv 2507.04416).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH OR NAME OF THIS", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH OR NAME OF THIS", trust_remote_code=True)
```

`trust_remote_code` runs the `rat_*.py` files that are here, which need PyTorch and transformers {transformers} or
newer. Where RAT Lab is installed, `import rat` takes their place, and with it its kernels.
"""


def export(model: CausalLM, folder: Path, tokenizer: Path | None = None, end_of_text: str | None = None) -> None:
    """Write weights, config, code, tokenizer and a model card.

    Args:
        model: any; its weights are written as they are, bit by bit.
        folder: of what is written; it is made where it is missing.
        tokenizer: a tokenizer.json, which AutoTokenizer finds. It takes text that looks like a special token for text.
        end_of_text: the tokenizer's token that ends a text; needed with a tokenizer. It is the padding, too, which
            nobody sees.

    Raises:
        ValueError: the tokenizer has more tokens than the model, or its end_of_text is missing.
    """
    if tokenizer is not None and end_of_text is None:
        raise ValueError(f"end_of_text is missing: the token that ends a text, of {tokenizer}")
    values: dict[str, Any] = model.config.to_dict()
    config = RATConfig(**values, dtype=model.embedding.weight.dtype)
    with torch.device("meta"):
        wrapped = RATForCausalLM(config)
    wrapped.model = model
    if tokenizer is not None:
        end = _save_tokenizer(tokenizer, str(end_of_text), folder, model.config.vocab_size)
        config.eos_token_id = config.pad_token_id = end
        wrapped.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    config.auto_map = auto_map()
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        wrapped.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    for weights in folder.glob("*.safetensors"):  # which only their writer could read
        shutil.copymode(folder / "config.json", weights)
    for name, source in carried_files().items():
        (folder / name).write_text(source)
    facts = {"pattern": ", ".join(model.config.pattern), "parameters": model.num_parameters()}
    (folder / "README.md").write_text(_CARD.format(transformers=__version__, **facts))


def _save_tokenizer(file: Path, end_of_text: str, folder: Path, vocab_size: int) -> int:
    """Write the tokenizer for AutoTokenizer; the id of its end of text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        eos_token=end_of_text,
        pad_token=end_of_text,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer {file} has {len(tokenizer)} tokens, the model {vocab_size}: give the one of its data"
        )
    tokenizer.save_pretrained(folder)
    # transformers writes it anew, and data is known by the very bytes of its tokenizer
    shutil.copyfile(file, folder / "tokenizer.json")
    end: int = tokenizer.convert_tokens_to_ids(end_of_text)  # type: ignore[assignment]
    return end
