"""Exported folders on a machine without this package, and what `import rat` tells transformers."""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

import rat.config
from rat import CausalLM
from rat.interop.huggingface.carried_code import carried_files
from rat.interop.huggingface.export import export
from rat.ops import use_backend

END = "<|endoftext|>"

ELSEWHERE = """
import sys
sys.modules["rat"] = None  # not installed
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(["the cat", "the cat sat on the mat " + tokenizer.eos_token], return_tensors="pt", padding=True)
found = {"module": type(model).__module__, "same": type(model.config).__module__.rsplit(".", 1)[0]}
found["ids"] = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask)]
found["eos"] = [model.config.eos_token_id, model.generation_config.eos_token_id, tokenizer.pad_token_id]
found["text"] = tokenizer.decode(found["ids"][1])
out = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
found["out"] = out[:, batch.input_ids.shape[1]:].tolist()
found["dtype"] = str(model.dtype)
model.save_pretrained(output)
again = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
found["again"] = torch.equal(again(**batch).logits, model(**batch).logits)
print(json.dumps(found))
"""

IMPORTS = """
import sys
sys.modules["transformers"] = None  # not installed
import rat
del sys.modules["transformers"]
assert not any(name.startswith("transformers") for name in sys.modules)
from transformers import AutoConfig
assert AutoConfig.from_pretrained(sys.argv[1]).model_config() == rat.CausalLM.from_pretrained(sys.argv[1]).config
assert "transformers.modeling_utils" not in sys.modules
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)).__module__)
"""


def python(script: str, *arguments: str | Path, home: Path, hub: str | None = None) -> str:
    environment = os.environ | {"HF_HOME": str(home)} | ({"HF_ENDPOINT": hub} if hub else {"HF_HUB_OFFLINE": "1"})
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=home, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the cat sat on the mat"] * 4, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_an_exported_folder_needs_transformers_alone(
    make_model: Callable[..., CausalLM], tokenizer: Path, tmp_path: Path, assert_same_weights: Callable[..., None]
) -> None:
    model = make_model("rat", "sliding_window", "rnn", "attention", vocab_size=272)
    folder = tmp_path / "my-model.v1"
    export(model, folder, tokenizer, END)
    found = json.loads(python(ELSEWHERE, folder, tmp_path / "again", home=tmp_path))
    assert found["module"].startswith("transformers_modules.my_hyphen_model_dot_v1.")
    assert found["module"].startswith(found["same"])
    ours = Tokenizer.from_file(str(tokenizer))
    ours.encode_special_tokens = True
    texts = ["the cat", f"the cat sat on the mat {END}"]
    assert found["ids"] == [ours.encode(text).ids for text in texts]
    assert found["text"] == texts[1]
    assert found["eos"] == [0, 0, 0]
    with use_backend("portable"):
        assert found["out"] == model.generate(found["ids"], max_new_tokens=8)
    assert found["again"]
    assert_same_weights(CausalLM.from_pretrained(folder, model.config), model)
    assert_same_weights(CausalLM.from_pretrained(tmp_path / "again"), model)
    assert (folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


@pytest.mark.slow
def test_an_exported_folder_on_the_hub_brings_all_its_code(
    make_model: Callable[..., CausalLM], tokenizer: Path, hub: Path, tmp_path: Path
) -> None:
    model = make_model("rat", "sliding_window", "rnn", "attention", vocab_size=272)
    export(model, hub, tokenizer, END)
    address = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")[0]
    found = json.loads(python(ELSEWHERE, "some/model", tmp_path / "again", home=tmp_path, hub=address))
    assert found["module"].startswith("transformers_modules.some.model.")
    with use_backend("portable"):
        assert found["out"] == model.generate(found["ids"], max_new_tokens=8)


def test_import_rat_is_enough_for_the_automatic_classes(make_model: Callable[..., CausalLM], tmp_path: Path) -> None:
    """It neither imports transformers nor needs it, and its classes go before an exported folder's own code."""
    export(make_model("rat"), tmp_path / "model")
    assert python(IMPORTS, tmp_path / "model", home=tmp_path) == "rat.interop.huggingface.modeling"


def test_the_code_that_travels_is_this_code() -> None:
    files = carried_files()
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                others = [node.module] if node.module else [alias.name for alias in node.names]
                assert {f"{other}.py" for other in others} <= set(files), name
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] != "rat", name
        assert '"rat::' not in source, "two copies in one process would share the operations of the later one"
    assert "rat_ops_gated_scan_portable.py" in files
    assert not [name for name in files if name.endswith(("_triton.py", "_flex.py", "kernels.py"))]
    assert files["rat_config.py"] == inspect.getsource(rat.config)


def test_a_tokenizer_of_another_model_is_refused(
    make_model: Callable[..., CausalLM], tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has 269 tokens, the model 40"):
        export(make_model("rat"), tmp_path / "model", tokenizer, END)


def test_a_config_does_not_name_code_that_is_not_there(make_model: Callable[..., CausalLM], tmp_path: Path) -> None:
    export(make_model("rat"), tmp_path / "model")
    assert "auto_map" in json.loads((tmp_path / "model" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_model_card_tells_how_to_load(make_model: Callable[..., CausalLM], tmp_path: Path) -> None:
    export(make_model("rat", "sliding_window"), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "the layers rat, sliding_window" in card
    assert "trust_remote_code=True" in card
    assert f"transformers {transformers.__version__}" in " ".join(card.split())


def test_others_may_read_an_exported_folder(make_model: Callable[..., CausalLM], tmp_path: Path) -> None:
    model = make_model("rat")
    export(model, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
