"""Work on shards that can be killed at any moment: a folder of parts, each whole or not there, and records of them.

    output/.parts/plan.json            what is made, and in how many units
    output/.parts/tokenizer.json
    output/.parts/unit-00000.json      how far a unit is, written after each of its parts
    output/.parts/train/00000-000.bin  the parts of it
    output/.parts/val/00000-000.bin

A merge gives train and val their index and renames them to output/train and output/val.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from datamodules.encoding import Encoded
from datamodules.output_folder import FULL_DISK, RECORD, differences, is_done
from datamodules.shards import INDEX, ShardError, ShardFile, ShardFileWriter, ShardIndex, TokenShards, shard_dtype
from datamodules.tokenizer import end_of_text_id, fingerprint, load_tokenizer

SPLITS = ("train", "val")


class Plan(NamedTuple):
    """What is made: the arguments and the source it depends on, and the number of units that the source has."""

    made_with: dict[str, Any]
    num_units: int

    def differences(self, other: "Plan") -> str:
        """In what another plan differs, in words."""
        return "; ".join(differences(self.made_with, other.made_with))


class WorkFolder:
    """The folder that `prepare pretrain` makes, finished or not.

    Args:
        output: the folder.
    """

    def __init__(self, output: Path) -> None:
        self.output = Path(output)
        self._parts = self.output / ".parts"
        self.tokenizer = self._parts / "tokenizer.json"

    @cached_property
    def _vocabulary(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    def is_done(self, plan: Plan, overwrite: bool) -> bool:
        """Whether output already is what `plan` makes; raises FileExistsError as `output_folder.is_done` does."""

        def check() -> None:
            for split in SPLITS:
                shards = TokenShards(self.output / split, tokenizer_sha256=fingerprint(self.output / "tokenizer.json"))
                if overwrite:  # asked for to mend what may be damaged
                    shards.verify()

        if self._parts.is_dir() and not (self.output / RECORD).is_file():
            return False
        done = is_done(self.output, plan.made_with, overwrite, check)
        if done:  # or killed before this
            self._clear()
        return done

    def is_begun(self, plan: Plan, overwrite: bool) -> bool:
        """Whether work on `plan` can go on here. Raises FileExistsError where other work stands half-way."""
        path = self._parts / "plan.json"
        if not (path.is_file() and self.tokenizer.is_file()):
            return False  # at most the beginning of a beginning
        changed = _read_plan(path).differences(plan)
        if changed and not overwrite:
            raise FileExistsError(
                f"{self.output} stands half-way, but {changed}: give the same arguments, another --output, or add"
                " --overwrite true"
            )
        return not changed

    def begin(self, plan: Plan) -> None:
        """Begin work, under the lock of the plan; what belongs to other work goes away."""
        path = self._parts / "plan.json"
        path.unlink(missing_ok=True)
        for entry in self._parts.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.suffix != ".lock":
                entry.unlink()
        for split in SPLITS:
            (self._parts / split).mkdir()
        _write_atomically(path, plan._asdict())

    @contextmanager
    def lock(self, name: str, shared: bool = False) -> Iterator[None]:
        """Keep others out of a unit, or (shared) keep the plan as it is; ShardError if that is not to be had."""
        self._parts.mkdir(parents=True, exist_ok=True)
        with (self._parts / f"{name}.lock").open("a+") as file:  # NFS locks only files that can be read and written
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ShardError(
                    f"another prepare is at work on {name} of {self.output}: wait for it or stop it, or give every"
                    " machine another --worker"
                ) from None
            yield

    def unit(self, number: int) -> "Unit":
        """The unit, as far as it is."""
        return Unit(self._parts, number, shard_dtype(self._vocabulary.get_vocab_size()))

    def merge(self) -> dict[str, list[ShardFile]]:
        """Move what all units have made to its place, with an index; the files of each split."""
        plan = _read_plan(self._parts / "plan.json")
        with self.lock("plan"):
            files = self._finished(plan)
            (self.output / RECORD).unlink(missing_ok=True)
            waiting = [split for split in SPLITS if (self._parts / split).is_dir()]
            if waiting == list(SPLITS):  # old splits go first, so that none ever stands beside a new one
                for split in SPLITS:
                    shutil.rmtree(self.output / split, ignore_errors=True)
            for split in waiting:  # all, but for a merge that was killed
                self._place(split, files[split])
            shutil.copyfile(self.tokenizer, self.output / "tokenizer.json")
            _write_atomically(self.output / RECORD, plan._asdict())
        self._clear()
        return files

    def _clear(self) -> None:
        """Remove the parts; what a kill leaves of them does not look like any."""
        old = self.output / ".parts.old"
        shutil.rmtree(old, ignore_errors=True)
        if self._parts.is_dir():
            self._parts.rename(old)
        shutil.rmtree(old, ignore_errors=True)

    def _finished(self, plan: Plan) -> dict[str, list[ShardFile]]:
        units = [self.unit(number) for number in range(plan.num_units)]
        if missing := [str(unit.number) for unit in units if not unit.done]:
            raise ValueError(
                f"{self.output}: {len(missing)} of {plan.num_units} units are not finished ({', '.join(missing[:8])}):"
                " call prepare pretrain again for each worker that was ended, then merge"
            )
        files = {split: [part[split] for unit in units for part in unit.parts if split in part] for split in SPLITS}
        for split in SPLITS:
            if not files[split]:
                raise ValueError(f"no document is left for {split}: give more text, or another --held_out")
        return files

    def _place(self, split: str, files: list[ShardFile]) -> None:
        made = self._parts / split
        vocab_size = self._vocabulary.get_vocab_size()
        ShardIndex(
            dtype=shard_dtype(vocab_size),
            vocab_size=vocab_size,
            eos_id=end_of_text_id(self._vocabulary),
            tokenizer_sha256=fingerprint(self.tokenizer),
            files=files,
        ).save(made)
        TokenShards(made)
        for stray in {path.name for path in made.iterdir()} - {file.name for file in files} - {INDEX}:
            (made / stray).unlink()
        made.rename(self.output / split)


class Unit:
    """A unit of the source on its way into parts.

    Attributes:
        number: which one.
        num_documents: documents of it that stand in its parts.
        parts: for each part, the file of each split that has one.
        done: whether that is all of it.
    """

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self.number, self._folder, self._dtype = number, folder, dtype
        self._record = folder / f"unit-{number:05d}.json"
        self.num_documents, self.parts, self.done = 0, list[dict[str, ShardFile]](), False
        if self._record.is_file():
            content = json.loads(self._record.read_text())
            self.num_documents, self.done = content["num_documents"], content["done"]
            self.parts = [{split: ShardFile(**file) for split, file in part.items()} for part in content["parts"]]

    def write(self, documents: Iterable[Encoded], shard_tokens: int, written: Callable[[Encoded], None]) -> None:
        """Write the rest of the unit.

        Args:
            documents: those behind the first `num_documents`.
            shard_tokens: a part ends behind the document with which its training tokens reach so many.
            written: is told of every document.

        Raises:
            ShardError: the disk is full.
        """
        open_files: dict[str, ShardFileWriter] = {}
        try:
            count = self.num_documents
            for document in documents:
                count += 1
                split = "val" if document.held_out else "train"
                file = open_files.get(split) or open_files.setdefault(split, self._new_file(split))
                file.write(document.tokens, num_bytes=document.num_bytes, num_chars=document.num_chars, num_documents=1)
                written(document)
                if split == "train" and file.num_tokens >= shard_tokens:
                    self._close(open_files, count)
            self.done = True
            self._close(open_files, count)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise ShardError(
                f"the disk of {self._folder.parent} is full: free some space and give the same command again;"
                " the parts that are finished stay"
            ) from error
        finally:
            for file in open_files.values():
                file.discard()

    def _new_file(self, split: str) -> ShardFileWriter:
        name = f"{self.number:05d}-{len(self.parts):03d}.bin"
        return ShardFileWriter(self._folder / split / name, self._dtype)

    def _close(self, files: dict[str, ShardFileWriter], num_documents: int) -> None:
        """Let the open files appear, and then the record of them."""
        self.parts.append({split: file.close() for split, file in files.items()})
        files.clear()
        self.num_documents = num_documents
        parts = [{split: asdict(file) for split, file in part.items()} for part in self.parts]
        _write_atomically(self._record, {"num_documents": num_documents, "done": self.done, "parts": parts})


def _read_plan(path: Path) -> Plan:
    try:
        return Plan(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent.parent} holds no work of prepare pretrain") from None


def _write_atomically(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
