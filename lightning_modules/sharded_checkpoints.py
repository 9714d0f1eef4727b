"""Checkpoints that are folders, a shard by each process: written atomically, and turned into one file and back.

Such a folder holds what torch.distributed.checkpoint writes of weights (`state_dict`; FSDPStrategy says `model`) and
optimisers (`optimizer_0`), parameters by name, and `meta.pt` with the rest of Lightning's checkpoint. One file holds
`state_dict` and a list `optimizer_states`, parameters by number: their place in the optimiser's groups.

Under tensor parallelism a folder's tensors have the shapes of `rat.tensor_parallel`; a file's are always those of one
process.
"""

import warnings
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lightning_modules.atomic import partial_of, remove, standing, take_place
from rat import CausalLM, ModelConfig

State = dict[str, Any]
Shapes = Mapping[str, torch.Size]
# Where a checkpoint keeps the architecture, and what its weights are called beside their name in the model.
MODEL_CONFIG, PREFIX = "model_config", "model."
_DAMAGE = (RuntimeError, OSError, EOFError, UnpicklingError, LookupError, ValueError)


def read_folder(folder: Path) -> State:
    """The checkpoint in a folder of shards, as one process would have written it into one file.

    No process group is needed; all of it has to fit into memory. Its metadata is a pickle, which can run code: read
    only folders from where you trust.

    Raises:
        ValueError: a part is missing or damaged, or the folder is no checkpoint.
    """
    _check_folder(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            content = _load_distributed_checkpoint(folder)
    except (CheckpointException, *_DAMAGE) as error:
        raise _damaged(folder, error) from None
    content["state_dict"] = content.pop("model", None) or content["state_dict"]
    keys = list(takewhile(content.__contains__, (f"optimizer_{i}" for i in count())))
    if keys:
        content["optimizer_states"] = [_by_number(content.pop(key)) for key in keys]
    _make_whole(content)
    return content


def write_folder(checkpoint: State, folder: Path, names: Sequence[str]) -> None:
    """Write a checkpoint of one file as a folder that FSDP2 reads.

    Args:
        checkpoint: what `torch.load` gives of the file.
        folder: a new one.
        names: of the optimiser's parameters, in its order.
    """
    rest = dict(checkpoint)
    state = {"state_dict": rest.pop("state_dict")}
    for i, optimizer in enumerate(rest.pop("optimizer_states", [])):
        state[f"optimizer_{i}"] = _by_name(optimizer, names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / _METADATA_FILENAME)


class WholeFolders:
    """For the strategies of Lightning that write a folder of shards: it is whole or not there, as one file would be.

    A mixin to be named before the strategy. A checkpoint that is one file is loaded as well.
    """

    def setup(self, trainer: Any) -> None:
        """Refuse a plugin that would be passed over in silence."""
        if isinstance(self._checkpoint_io, AsyncCheckpointIO):
            raise ValueError(
                f"{type(self).__name__} writes its shards itself, which {type(self._checkpoint_io).__name__} cannot do"
                " in the background: leave that plugin out of trainer.plugins"
            )
        super().setup(trainer)

    def save_checkpoint(self, checkpoint: State, filepath: str | Path, storage_options: Any | None = None) -> None:
        """Write beside `filepath` on all ranks, then move on one. Raises OSError where one of them could not write."""
        path = Path(self.broadcast(filepath))
        partial = partial_of(path)
        if self.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(partial)
        self.barrier()
        one_file = isinstance(self, ModelParallelStrategy) and not self._save_distributed_checkpoint
        if one_file and self.is_global_zero:
            _make_whole(checkpoint)
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
        except CheckpointException as failed:
            self._give_up(partial, failed)
        except OSError:
            remove(partial)
            raise
        self.barrier()
        if self.is_global_zero:
            take_place(path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> State:
        """As Lightning's, after the module has had a look: another model is refused by name, not by its shapes.

        Where FSDP2 has given the weights other shapes than they were saved in, and where a model became a checkpoint
        of step 0, rank 0 reads all of it into memory and hands it out.

        Raises:
            ValueError: another model, what is no whole checkpoint, or under FSDP training from a checkpoint of step 0.
        """
        path = standing(Path(self.broadcast(checkpoint_path)))
        content = _description(path)
        self.lightning_module.on_load_checkpoint(content)
        starts_anew = content.get("optimizer_states") == []
        if isinstance(self, ModelParallelStrategy):
            shapes = {name: x.shape for name, x in get_model_state_dict(self.model).items()}
            if starts_anew or _saved_shapes(path, content) != shapes:
                self._hand_out(path, content, shapes)
                return {key: content[key] for key in content.keys() - {"state_dict", "optimizer_states"}}
        elif starts_anew and self.optimizers:
            raise ValueError(f"{path} has no optimiser, which FSDP needs: give the model itself as model.init_from")
        try:
            return super().load_checkpoint(path, weights_only)
        except CheckpointException as error:
            raise _damaged(path, error) from None

    def _hand_out(self, path: Path, content: State, shapes: Shapes) -> None:
        """Load weights and optimisers from what rank 0 reads; `shapes` are those that the weights have here.

        Optimisers start anew where the checkpoint has a list of none.
        """
        weights: State = {}
        restored = [] if content.get("optimizer_states") == [] else self.optimizers
        optimizers: list[State] = [{} for _ in restored]
        problem = None
        if self.is_global_zero:
            try:
                whole, names = read_folder(path) if path.is_dir() else content, list(_whole_shapes(content))
                weights, saved = whole["state_dict"], whole.get("optimizer_states", [])
                if len(saved) < len(optimizers):
                    raise ValueError(f"{path} holds weights without their optimiser: training cannot go on from it")
                optimizers = [_by_name(state, names) for state in saved[: len(optimizers)]]
                _reshape(weights, optimizers, shapes)
            except ValueError as error:
                problem = error
        if problem := self.broadcast(problem):
            raise problem
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, weights, options=options)
        for optimizer, state in zip(restored, optimizers, strict=True):
            set_optimizer_state_dict(self.model, optimizer, state, options=options)

    def _give_up(self, partial: Path, failed: CheckpointException) -> None:
        if self.is_global_zero:
            remove(partial)
        error = _first(failed)
        raise OSError(error.errno, error.strerror, str(partial)) if isinstance(error, OSError) else error from None


def _description(path: Path) -> State:
    """Everything in a checkpoint but weights and optimiser; of one file these too, unread."""
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.is_dir():
        _check_folder(path)
        path /= _METADATA_FILENAME
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _DAMAGE as error:
        raise _damaged(path, error) from None


def _check_folder(folder: Path) -> None:
    for name in (".metadata", _METADATA_FILENAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no whole checkpoint of shards: it holds no {name}")


def _damaged(path: Path, error: BaseException) -> ValueError:
    reason = str(_first(error)).partition("\n")[0]
    return ValueError(f"{path} is damaged or incomplete: copy it again, or give another ({reason})")


def _first(error: BaseException) -> BaseException:
    """What went wrong on the first of the ranks where something did."""
    return next(reason for reason, _ in error.failures.values()) if isinstance(error, CheckpointException) else error


def _whole_shapes(checkpoint: State) -> Shapes:
    """Of the parameters of its model in one process, under their names in `state_dict`, in the optimiser's order."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(checkpoint[MODEL_CONFIG], "the checkpoint's config"))
    return {PREFIX + name: p.shape for name, p in model.named_parameters()}


def _saved_shapes(path: Path, content: State) -> Shapes:
    """Of the weights in a checkpoint, of which `content` is the description."""
    if not path.is_dir():
        return {name: x.shape for name, x in content["state_dict"].items()}
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    weights = "state_dict."
    return {name.removeprefix(weights): x.size for name, x in saved.items() if name.startswith(weights)}


def _reshape(weights: State, optimizers: Sequence[State], shapes: Shapes) -> None:
    """Give weights, and what optimisers keep of them by number or name, other shapes; in place.

    What has another number of elements stays, for others to refuse.
    """
    for i, (name, shape) in enumerate(shapes.items()):
        kept = [optimizer["state"].get(name, optimizer["state"].get(i, {})) for optimizer in optimizers]
        for tensors, key in [(weights, name), *((state, key) for state in kept for key in state)]:
            x = tensors.get(key)
            if isinstance(x, Tensor) and x.ndim and x.numel() == shape.numel():
                tensors[key] = x.reshape(shape)


def _make_whole(checkpoint: State) -> None:
    """Give everything the shapes of one process, where the checkpoint tells them; in place."""
    if MODEL_CONFIG in checkpoint:
        _reshape(checkpoint["state_dict"], checkpoint.get("optimizer_states", []), _whole_shapes(checkpoint))


def _by_number(optimizer: State) -> State:
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    numbers = {name: i for i, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {i: optimizer["state"][name] for name, i in numbers.items()}, "param_groups": groups}


def _by_name(optimizer: State, names: Sequence[str]) -> State:
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {names[i]: state for i, state in optimizer["state"].items()}, "param_groups": groups}
