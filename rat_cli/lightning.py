"""fit, validate, test and predict: a LightningCLI whose YAML files can build on others and whose errors name them."""

import logging
import shutil
import signal
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.io import CheckpointIO

from lightning_modules import BadStepGuard, LanguageModel, LastCheckpoint, Preemption, RunRecord
from lightning_modules.atomic import replacing
from lightning_modules.checkpoints import AtomicCheckpointIO
from lightning_modules.dashboard import preformatted, writers
from lightning_modules.predictions import PredictionWriter
from lightning_modules.preemption import SIGNALS
from lightning_modules.run_folder import run_folder
from lightning_modules.slurm import slurm_environments
from rat_cli.config_files import ConfigFile, ConfigParser


class LightningParser(ConfigParser, LightningArgumentParser):
    """Lightning's parser with our errors."""


class RunConfig(SaveConfigCallback):
    """Writes what `fit` was told to config.yaml in the run's folder, and to TensorBoard's texts; what the file said
    before goes to config-1.yaml, ..."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write, if this is training."""
        if stage == "fit":
            self._path = run_folder(trainer) / self.config_filename  # which all ranks have to ask for
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write both, on rank 0."""
        text, path = self.parser.dump(self.config, skip_none=False), self._path
        if path.is_file() and path.read_text() != text:
            number = 1 + len(list(path.parent.glob(f"{path.stem}-*{path.suffix}")))
            shutil.copyfile(path, path.with_stem(f"{path.stem}-{number}"))
        with replacing(path) as partial:
            partial.write_text(text)
        for writer in writers(trainer):
            writer.add_text("config", preformatted(text), 0)


class RatCLI(LightningCLI):
    """A concrete model, any data module; every fit guards its steps, and keeps config, summary, errors and checkpoints
    in one folder."""

    def __init__(self, args: Sequence[str] | None, **kwargs: Any) -> None:
        super().__init__(
            LanguageModel,
            LightningDataModule,
            args=args,
            subclass_mode_data=True,
            parser_class=LightningParser,
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},
            **kwargs,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with our `--config`."""
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="YAML file; later ones win. Repeat to layer.")
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Beside trainer, model and data: what is to become of bad steps."""
        super().add_core_arguments_to_parser(parser)
        parser.add_lightning_class_args(BadStepGuard, "guard")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`; Lightning's own warns where they are not those of the process."""
        self.config = parser.parse_args(args)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        plugins = _as_list(config.get("plugins"))
        if not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            plugins = [*plugins, *slurm_environments()]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        config["plugins"] = plugins
        if self.subcommand == "predict":
            callbacks = [*callbacks, PredictionWriter()]
        if self.subcommand == "fit":
            callbacks = [*callbacks, RunRecord()]
            given = [type(callback) for callback in _as_list(config.get("callbacks"))]
            if LastCheckpoint in given and Preemption not in given:
                callbacks = [*callbacks, Preemption()]
            elif Preemption not in given:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if config.get("enable_progress_bar") is not False and not any(
            isinstance(callback, ProgressBar) for callback in _as_list(config.get("callbacks"))
        ):
            # Lightning's own choice depends on whether some package has brought `rich` along.
            callbacks = [*callbacks, TQDMProgressBar()]
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's reads the whole checkpoint for arguments to override, and the config is to decide."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """What the Trainer's method is called with. Raises ValueError where there is no last checkpoint to look at."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        logger = self.trainer.logger
        numbered = isinstance(logger, TensorBoardLogger | CSVLogger) and logger._version is None
        if subcommand == "fit" and numbered and kwargs.get("ckpt_path") == "last":
            raise ValueError(
                "--ckpt_path last: the logger gives every run another folder, so there is nothing to go on from:"
                " set trainer.logger.init_args.version"
            )
        if subcommand != "fit" and kwargs.get("ckpt_path") == "last":
            savers = [saver for saver in self.trainer.callbacks if isinstance(saver, ModelCheckpoint)]
            if not any(saver._find_last_checkpoints(self.trainer) for saver in savers):
                raise ValueError("--ckpt_path last: this run has no checkpoint yet: fit first, or give a file")
        return kwargs

    def instantiate_classes(self) -> None:
        """Make trainer, model and data. Raises ValueError with what the one at fault says, without its wrapping."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(str(error.__cause__ or error)) from None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def run(args: list[str]) -> None:
    """Parse `args`, a subcommand first, and run it."""
    # Noise about the insides of Lightning and PyTorch, and advertisement.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    # The norm of gradients takes two sums under tensor parallelism, of one number each.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    RatCLI(args)
