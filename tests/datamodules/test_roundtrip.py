"""Real prose goes through the whole pipeline and comes back to the letter.

The default are the descriptions and licences of the installed packages. More, such as the documentation of a kernel:
    pytest tests/datamodules/test_roundtrip.py --prose FOLDER
"""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from datamodules.pretraining import prepare_pretrain
from datamodules.shards import TokenShards
from datamodules.tokenizer import load_tokenizer


@pytest.fixture
def prose(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if given := request.config.getoption("--prose"):
        return Path(given)
    installed = filter(Path.is_file, Path(sysconfig.get_path("purelib")).glob("*.dist-info/**/*"))
    folder = tmp_path / "prose"
    folder.mkdir()
    for number, path in enumerate(sorted(path for path in installed if path.name.startswith(("METADATA", "LICENSE")))):
        (folder / f"{number:04d}.txt").write_text(path.read_text(errors="replace"), newline="")
    return folder


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_document_comes_back(prose: Path, tmp_path: Path, num_processes: int) -> None:
    output = tmp_path / "out"
    options = {"vocab_size": 8000, "held_out": 0.05, "shard_tokens": 200_000, "num_processes": num_processes}
    prepare_pretrain(output, str(prose), **options)  # type: ignore[arg-type]
    tokenizer, found = load_tokenizer(output), []
    for split in ("train", "val"):
        shards = TokenShards(output / split)
        shards.verify()
        tokens = shards.tokens(0, shards.num_tokens)
        ends = np.flatnonzero(tokens == shards.index.eos_id)
        assert ends[-1] == shards.num_tokens - 1
        found += [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends + 1)[:-1]]
    wanted = [path.read_bytes().decode() for path in prose.glob("*.txt")]
    assert len(wanted) > 50
    assert sorted(found) == sorted(text for text in wanted if text.strip())
