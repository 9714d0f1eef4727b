"""How fast the loader delivers batches."""

import tempfile
import time
from pathlib import Path

import numpy as np

from datamodules.dataset import TokenDataset, TokenLoader
from datamodules.sampler import TrainSampler
from datamodules.shards import ShardWriter, TokenShards

_VOCAB_SIZE = 32_000
_MADE_TOKENS = 1 << 25


def loader_throughput(
    path: Path | None = None,
    seq_len: int = 1024,
    batch_size: int = 32,
    num_workers: int = 1,
    seconds: float = 2.0,
    num_shards: int = 8,
) -> dict[str, float]:
    """Tokens per second that the loader delivers as int64 batches from shards in the page cache.

    The shards are read once before the clock starts. Every batch is taken from the loader and dropped, so
    this is an upper bound on what training can be fed with. Without `path` random shards are made, 67 MB in a
    temporary folder; call it with several `num_shards` to see that their number does not matter.

    Args:
        path: shards to read. Default: made for this call.
        seq_len: tokens of a sample.
        batch_size: samples of a batch.
        num_workers: processes that read ahead; 0 reads in this one.
        seconds: how long to measure.
        num_shards: files to make, without `path`.

    Returns:
        `tokens_per_second`, `tokens_per_second_per_worker` (one worker's if they are 0),
        `batches_per_second`, `first_batch_seconds` (starting the workers included), `num_shards`, `seq_len`,
        `batch_size`, `num_workers`.

    Raises:
        ValueError: no time, or shards that do not hold one batch.
    """
    if seconds <= 0:
        raise ValueError(f"seconds={seconds} must be positive")
    if path is not None:
        return _measure(TokenShards(path), seq_len, batch_size, num_workers, seconds)
    with tempfile.TemporaryDirectory() as folder:
        shards = _make_shards(Path(folder) / "shards", num_shards)
        return _measure(shards, seq_len, batch_size, num_workers, seconds)


def _measure(shards: TokenShards, seq_len: int, batch_size: int, num_workers: int, seconds: float) -> dict[str, float]:
    for file in shards.index.files:
        (shards.folder / file.name).read_bytes()
    dataset = TokenDataset(shards, seq_len, eos_id=shards.index.eos_id or 0)
    started, batches, epoch = time.perf_counter(), 0, 0
    first = None
    while first is None or time.perf_counter() - first < seconds:
        sampler = TrainSampler(len(dataset), micro_batch=batch_size, global_batch=batch_size, epoch=epoch)
        for _ in TokenLoader(dataset, sampler, num_workers):
            if first is None:
                first = time.perf_counter()
                continue
            batches += 1
            if time.perf_counter() - first >= seconds:
                break
        epoch += 1
    per_second = batches / (time.perf_counter() - first)
    tokens = per_second * batch_size * seq_len
    return {
        "tokens_per_second": tokens,
        "tokens_per_second_per_worker": tokens / max(1, num_workers),
        "batches_per_second": per_second,
        "first_batch_seconds": first - started,
        "num_shards": len(shards.index.files),
        "seq_len": seq_len,
        "batch_size": batch_size,
        "num_workers": num_workers,
    }


def _make_shards(folder: Path, num_shards: int) -> TokenShards:
    tokens = np.random.default_rng(0).integers(_VOCAB_SIZE, size=_MADE_TOKENS)
    with ShardWriter(folder, vocab_size=_VOCAB_SIZE, eos_id=2, shard_tokens=-(-_MADE_TOKENS // num_shards)) as writer:
        writer.write(tokens)
    return TokenShards(folder)
