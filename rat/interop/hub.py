"""Models by their names on the Hugging Face hub: folders of `save_pretrained`, and released .pth files."""

import json
import re
from contextlib import suppress
from pathlib import Path

# The files of a folder; the last names those of weights that transformers has cut in pieces.
CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"

_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(/(?P<file>[\w./-]+\.pth))?")


def could_be_on_the_hub(path: Path) -> bool:
    """Whether this reads like the name of a repository, or of a .pth file in one."""
    return _NAME.fullmatch(path.as_posix()) is not None and path.suffix != ".ckpt"


def download(path: Path) -> Path:
    """A model of the hub, from the cache if it was asked for before.

    Args:
        path: ORGANISATION/NAME, or ORGANISATION/NAME/FILE.pth where a repository holds several released files.

    Returns:
        The folder with config.json, weights and the tokenizer.json that is there, or the .pth file.

    Raises:
        FileNotFoundError: there is none of this name, or no network.
        ValueError: the repository does not say which model is meant.
    """
    from huggingface_hub import hf_hub_download

    name = _NAME.fullmatch(path.as_posix())
    assert name is not None
    repository, file = name["repository"], name["file"]
    try:
        if file is None and (folder := _folder(repository)) is not None:
            return folder
        return Path(hf_hub_download(repository, file or _only_released(repository)))
    except ValueError:
        raise
    except Exception as error:  # the library raises a dozen kinds
        raise FileNotFoundError(
            f"no model at {path}: there is no such folder or file here, and the hub gave none by this name;"
            f" check the name and the network ({str(error).splitlines()[0]})"
        ) from error


def _folder(repository: str) -> Path | None:
    """The files of a folder of `save_pretrained`; None if the repository is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        folder = Path(hf_hub_download(repository, CONFIG)).parent
    except RemoteEntryNotFoundError:
        return None
    try:
        shards = json.loads(Path(hf_hub_download(repository, SHARDS)).read_text())
        files = sorted(set(shards["weight_map"].values()))
    except RemoteEntryNotFoundError:
        files = [WEIGHTS]
    for file in files:
        hf_hub_download(repository, file)
    with suppress(RemoteEntryNotFoundError):
        hf_hub_download(repository, "tokenizer.json")
    return folder


def _only_released(repository: str) -> str:
    from huggingface_hub import list_repo_files

    files = [file for file in list_repo_files(repository) if file.endswith(".pth")]
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} .pth files: name one, as in {repository}/{files[0]}" if files else "no .pth file"
    raise ValueError(f"{repository} of the hub holds no {CONFIG} and {found}")
