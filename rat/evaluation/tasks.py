"""Tasks of lm-eval with their documents: from the hub, from local files, or made for a tokenizer."""

import contextlib
import importlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import numpy as np
import requests
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tokenizers import Tokenizer

from rat.evaluation.suites import Job

# By the name of their builder in the datasets library.
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
# Where lm-eval keeps the tasks of our suites; it takes many seconds to read all that it has.
_FOLDERS = ("arc", "hellaswag", "lambada", "longbench", "piqa", "ruler", "winogrande")
_SEED = 1234
# From the folder of a task's documents, if there is one, to its configuration, as lm-eval has them.
OwnTask = Callable[[Path | None], dict[str, Any]]


class TaskLoader:
    """Finds tasks and builds them.

    Args:
        data: a folder with FOLDER/TASK/SPLIT.jsonl, .parquet or .arrow, or FOLDER/TASK/SPLIT/ with such files, in the
            columns that the task has on the hub; tasks that are not there come from the hub.
        tokenizer: sizes the prompts of tasks that make them.
        own: tasks that lm-eval does not have, by name; the configuration makes the documents itself, by a
            `custom_dataset`, which raises ConnectionError where the hub cannot be reached.
    """

    def __init__(self, data: Path | None, tokenizer: Tokenizer, own: Mapping[str, OwnTask] | None = None) -> None:
        if data is not None and not data.is_dir():
            raise FileNotFoundError(f"there is no folder {data}")
        self.data, self.tokenizer, self.own = data, tokenizer, own or {}
        folders = [Path(lm_eval.tasks.__file__).with_name(name) for name in _FOLDERS]
        self.manager = TaskManager(include_path=folders, include_defaults=False)

    def leaves(self, name: str) -> list[str]:
        """The tasks that a name stands for: itself, or those of a group or tag.

        Raises:
            ValueError: there is nothing of that name.
        """
        if name in self.own:
            return [name]
        if name not in self.manager.task_index:
            self.manager = TaskManager()
        index = self.manager.task_index
        if name not in index:
            close = get_close_matches(name, [*self.own, *index], n=3)
            hint = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"lm-eval has no task {name!r}{hint} (`lm_eval ls tasks` lists them all)")
        entry = index[name]
        kind = entry.kind.name
        if kind == "TAG":
            members = sorted(entry.tags)
        elif kind == "GROUP":
            members = [item if isinstance(item, str) else item["task"] for item in load_yaml(entry.yaml_path)["task"]]
        else:
            return [name]
        return [leaf for member in members for leaf in self.leaves(member)]

    def load(self, job: Job) -> Any:
        """The job's task, with its documents.

        Raises:
            FileNotFoundError: a folder of the task holds no split that it can be evaluated on.
            ValueError: its documents are on the hub, which cannot be reached; rows of files are not the task's; its
                prompts cannot be made so short.
        """
        local = None if self.data is None or not (self.data / job.task).is_dir() else self.data / job.task
        config = self.own[job.task](local) if job.task in self.own else self._config(job.task, local)
        if job.suite is not None and job.suite.stop:
            options = dict(config.get("generation_kwargs") or {})
            config["generation_kwargs"] = options | {"until": [*options.get("until", []), *job.suite.stop]}
        with contextlib.ExitStack() as stack:
            if job.length is not None:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                config["metadata"] |= _made_prompts(self.tokenizer, job.length, Path(folder))
                _check_room(job.task, job.length, self.tokenizer)
            return self._build(job, config)

    def _config(self, name: str, local: Path | None) -> dict[str, Any]:
        entry = self.manager.task_index[name]
        with contextlib.redirect_stdout(io.StringIO()):  # of what its modules tell when they are imported
            config = load_yaml(entry.yaml_path) if entry.yaml_path else dict(entry.cfg or {})
        config["metadata"] = dict(config.get("metadata") or {})
        return config | (_from_files(config, local) if local is not None else {})

    def _build(self, job: Job, config: dict[str, Any]) -> Any:
        random.seed(_SEED)
        np.random.seed(_SEED)
        try:
            # lm-eval's makers of prompts tell of every step
            with contextlib.redirect_stdout(io.StringIO()):
                return self.manager.load([config])["tasks"][job.task]
        except (ConnectionError, requests.ConnectionError) as error:
            source = config.get("dataset_path")
            raise ValueError(
                f"task {job.task} takes its documents from the hub's {source}, which cannot be reached: connect to a"
                f" network, or put them into FOLDER/{job.task}/SPLIT.jsonl (or .parquet, .arrow) and give --data FOLDER"
                f" ({error})"
                if source
                else f"task {job.task} makes its prompts of what it downloads, and there is no network ({error})"
            ) from None
        except Exception as error:  # rows that do not fit raise errors of many kinds
            if "data_files" in (config.get("dataset_kwargs") or {}):
                raise ValueError(
                    f"{self.data}/{job.task} holds no rows with the columns that {job.task} has on the hub: {error}"
                ) from error
            if job.length is None or not isinstance(error, ValueError):
                raise
            raise ValueError(f"{job.task} makes no prompts of {job.length} tokens: {error}") from None


def _from_files(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What makes a task read its splits from `folder`; a split of the task that is not there is none of it."""
    files = {split: sorted(map(str, _files(folder, split))) for split in set(_SPLITS.values())}
    found = {split: names for split, names in files.items() if names}
    changes: dict[str, Any] = {}
    for key, split in _SPLITS.items():
        changes[key] = split if config.get(key) and split in found else None
    if changes["validation_split"] is None and changes["test_split"] is None:
        wanted = [_SPLITS[key] for key in ("validation_split", "test_split") if config.get(key)]
        raise FileNotFoundError(f"{folder} holds no {' or '.join(wanted)}.jsonl, .parquet or .arrow to evaluate on")
    builders = {_BUILDERS[Path(name).suffix] for names in found.values() for name in names}
    if len(builders) > 1:
        raise ValueError(f"{folder} mixes files of several kinds ({', '.join(sorted(builders))}): keep one")
    changes |= {"dataset_path": builders.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": found}}
    if "{{question}}" in str(config.get("doc_to_text")) and config["task"].startswith("longbench_"):
        changes["process_docs"] = _with_question
    return changes


def _files(folder: Path, split: str) -> Iterator[Path]:
    for kind in _BUILDERS:
        yield from folder.glob(f"{split}{kind}")
        yield from (folder / split).glob(f"*{kind}") if kind != ".json" else ()  # of save_to_disk: no rows


def _with_question(documents: Any) -> Any:
    """LongBench's own files call `input` what the copy that lm-eval reads calls `question`."""
    return documents if "question" in documents.column_names else documents.rename_column("input", "question")


def _made_prompts(tokenizer: Tokenizer, length: int, folder: Path) -> dict[str, Any]:
    """What RULER's tasks ask for: lengths, and a tokenizer that transformers can load from a folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    # Its words are drawn by a generator of the module's own, which goes on from task to task.
    importlib.import_module("lm_eval.tasks.ruler.cwe_utils").RNG.seed(_SEED)
    return {"max_seq_lengths": [length], "tokenizer": str(folder)}


def _check_room(task: str, length: int, tokenizer: Tokenizer) -> None:
    """Refuse lengths for which RULER would look for a short enough prompt forever."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    needed = 0
    if task == "ruler_vt":
        vt, answer, room = importlib.import_module("lm_eval.tasks.ruler.vt_utils"), 30, 500
        if count(vt.generate_input_output(5, 1, 4, is_icl=True)[0]) + answer > room:
            raise ValueError(f"{task} shows an example of {room} tokens, into which none fits with this tokenizer")
        with contextlib.redirect_stdout(io.StringIO()):
            example = vt.sys_vartrack_w_noise_random(
                lambda text: SimpleNamespace(input_ids=tokenizer.encode(text).ids), 1, room, incremental=5
            )[0]
        shown = count(f"{example['input']} {' '.join(example['outputs'])}\n\n")
        needed = shown + answer + count(vt.generate_input_output(10, 1, 4)[0])
    elif task == "ruler_cwe":
        cwe = importlib.import_module("lm_eval.tasks.ruler.cwe_utils")
        # its words are drawn anew each time; it counts an example too, though it shows none
        drawn = [cwe.generate_input_output(10, length) for _ in range(20)]
        needed = 120 + max(count(f"{shown}\n{text} 10. {' 10. '.join(words)}") for shown, text, words in drawn)
    if length < needed:
        raise ValueError(f"{task} needs prompts of {needed} tokens or more with this tokenizer, not {length}")
