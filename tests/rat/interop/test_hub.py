"""Models by their names on the hub, which is a server on this machine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rat import CausalLM

from .test_released import released_names

Same = Callable[[CausalLM, CausalLM], None]


@pytest.fixture
def model(make_model: Callable[..., CausalLM]) -> CausalLM:
    return make_model("rat", "sliding_window")


@pytest.mark.parametrize("pieces", [False, True])
def test_a_folder_comes_by_its_name(
    hub: Path, model: CausalLM, tmp_path: Path, assert_same_weights: Same, pieces: bool
) -> None:
    model.save_pretrained(hub)
    if pieces:
        theirs = AutoModelForCausalLM.from_pretrained(hub)
        (hub / "model.safetensors").unlink()
        theirs.save_pretrained(hub, max_shard_size="4KB")
    found = CausalLM.from_pretrained("some/model", model.config)
    assert_same_weights(found, model)


@pytest.mark.parametrize("names", [["a.pth"], ["a.pth", "deep/b.pth"], []])
def test_a_released_file_comes_by_its_name(
    hub: Path, model: CausalLM, monkeypatch: pytest.MonkeyPatch, assert_same_weights: Same, names: list[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository: ["README.md", *names])
    for name in names:
        (hub / name).parent.mkdir(exist_ok=True)
        torch.save({"task": released_names(model), "config": {}}, hub / name)
    if len(names) == 1:
        assert_same_weights(CausalLM.from_pretrained("some/model", model.config), model)
        return
    told = r"2 .pth files: name one, as in some/model/a.pth" if names else "no .pth file"
    with pytest.raises(ValueError, match=f"some/model of the hub holds no config.json and {told}"):
        CausalLM.from_pretrained("some/model", model.config)
    if names:
        assert_same_weights(CausalLM.from_pretrained("some/model/deep/b.pth", model.config), model)


def test_what_cannot_be_reached_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model at some/model/none.pth: .* the hub gave none by this name"):
        CausalLM.from_pretrained("some/model/none.pth")

    def no_network(*_: str) -> str:
        raise OSError("no route to the host\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(FileNotFoundError, match=r"no model at other/model: .* the network \(no route to the host\)$"):
        CausalLM.from_pretrained("other/model")


@pytest.mark.parametrize(
    "name", ["nowhere", "runs/last.ckpt", "runs/some/model", "/tmp/none.pth", "some/model/readme.md", "../a"]
)
def test_other_names_are_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rat.interop.hub.download", lambda path: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"no model at {name}: neither a folder"):
        CausalLM.from_pretrained(name)
