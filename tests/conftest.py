"""What several folders of tests share: shards, a hub, and Triton kernels that run without a GPU."""

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Workers that share the cores would wait for each other's threads; read where PyTorch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

# Read where the kernels are defined, so before anything of `rat` is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from datamodules.shards import ShardWriter

# Imported once, by the process whose forks are the ranks of the tests (start_method="forkserver"): an import takes
# longer than what most of these do.
multiprocessing.set_forkserver_preload(["rat_cli.lightning", "lightning_modules.sharding", "datamodules.tokens"])

VOCAB_SIZE, EOS = 64, 63


@pytest.fixture(scope="session")
def random_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: train/ and val/ of random tokens below 64, with ends of text, 3 bytes a token."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 4000), ("val", 500)):
        with ShardWriter(folder / split, vocab_size=VOCAB_SIZE, eos_id=EOS) as writer:
            writer.write(draw.integers(VOCAB_SIZE, size=count), num_bytes=3 * count, num_chars=3 * count)
    return folder


class Hub(BaseHTTPRequestHandler):
    """A hub that serves the files of a folder, as far as a download asks."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        content = self._answer()
        self.wfile.write(content)

    def _answer(self) -> bytes:
        file = self.folder / self.path.rpartition("/resolve/main/")[2]
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b""
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Lightning keeps the group of a distributed run until its process ends; here the next test is in that process."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a hub on this machine serves as the repository some/model."""
    folder = tmp_path / "hub"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    server.server_close()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Another corpus for tests/datamodules/test_roundtrip.py."""
    parser.addoption("--prose", type=Path, help="folder of .txt files for tests/datamodules/test_roundtrip.py")
