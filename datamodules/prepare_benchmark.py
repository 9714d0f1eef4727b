"""How fast text becomes shards, beside what the tokenizer alone can do, and in how much memory."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datamodules.corpus import docstring_documents, find_modules
from datamodules.text_sources import Split
from datamodules.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
_ENCODE = """
import json, os, sys, time
os.environ["RAYON_NUM_THREADS"] = sys.argv[3]
from datamodules.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2])]
start = time.perf_counter()
encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
seconds = time.perf_counter() - start
print(sum(map(len, encoded)) / seconds)
"""


def prepare_throughput(
    vocab_size: int = 32_000, num_processes: int | None = None, copies: tuple[int, ...] = (1, 4), repeats: int = 5
) -> None:
    """Time `cli.py prepare pretrain` as a whole process on real English, beside the tokenizer's own batch call.

    The text is that of the docstrings of the installed packages, as .jsonl, once or several times over, the BPE is
    trained on it. Both take turns. `ratio` is the pipeline's rate, everything from its start to the merge included,
    over that of one call of `encode_batch_fast` on all texts in memory with as many threads.

    `peak` is the memory of its largest process.

    Args:
        vocab_size: of the BPE.
        num_processes: that encode. Default: one for each core.
        copies: how often the text is repeated, for each row of the table: memory should not grow with it.
        repeats: rounds, of which the medians are shown.

    Raises:
        ValueError: numbers below 1.
    """
    processes = num_processes or os.cpu_count() or 1
    if min(repeats, processes, *copies) < 1:
        raise ValueError(f"impossible: {repeats=}, {num_processes=}, {copies=}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [document.text for document in docstring_documents(find_modules(), Split(0.5, 0), processes)]
        train_tokenizer(texts, vocab_size).save(str(folder / "tokenizer.json"))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        tokens = sum(map(len, load_tokenizer(folder).encode_batch_fast(texts, add_special_tokens=False))) + len(texts)
        (folder / "once.jsonl").write_text(lines)
        print(f"{len(texts):,} documents, {tokens:,} tokens of {vocab_size:,}; {processes} processes;", end=" ")
        print(f"medians of {repeats} interleaved rounds")
        print(f"{'tokens':>12}{'seconds':>9}{'tokens/s':>12}{'a core':>11}{'tokenizer':>12}{'ratio':>7}{'peak MB':>9}")
        for count in copies:
            source = folder / f"source-{count}"
            source.mkdir()
            for copy in range(count):
                (source / f"{copy}.jsonl").write_text(lines)
            rounds = [
                (_tokenizer_rate(folder, processes), *_prepare(folder, source, processes)) for _ in range(repeats)
            ]
            alone, seconds, peak = (statistics.median(figures) for figures in zip(*rounds, strict=True))
            rate = count * tokens / seconds
            print(
                f"{count * tokens:>12,}{seconds:>9.1f}{rate:>12,.0f}{rate / processes:>11,.0f}{alone:>12,.0f}"
                f"{rate / alone:>7.2f}{peak / 2**20:>9.0f}",
                flush=True,
            )


def _tokenizer_rate(folder: Path, threads: int) -> float:
    """Tokens/s of the tokenizer's own batch call."""
    files = [str(folder / "tokenizer.json"), str(folder / "once.jsonl")]
    done = subprocess.run(
        [sys.executable, "-c", _ENCODE, *files, str(threads)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def _prepare(folder: Path, source: Path, processes: int) -> tuple[float, int]:
    """Seconds of the whole command, and bytes of memory of the largest of its processes."""
    options = {"output": folder / "out", "source": source, "tokenizer": folder / "tokenizer.json"}
    arguments = [f"--{name}={value}" for name, value in {**options, "num_processes": processes}.items()]
    start = time.perf_counter()
    command = [sys.executable, "cli.py", "prepare", "pretrain", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    shutil.rmtree(folder / "out")
    return seconds, usage.ru_maxrss * 1024
