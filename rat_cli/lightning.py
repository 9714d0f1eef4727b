"""fit, validate, test and predict: a LightningCLI whose YAML files can build on others and whose errors name them."""

import logging
import signal
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.io import CheckpointIO

from lightning_modules import LanguageModel, LastCheckpoint, Preemption
from lightning_modules.callbacks import PredictionWriter
from lightning_modules.checkpoints import AtomicCheckpointIO
from lightning_modules.preemption import SIGNALS
from lightning_modules.slurm import slurm_environments
from rat_cli.config_files import ConfigFile, ConfigParser


class LightningParser(ConfigParser, LightningArgumentParser):
    """Lightning's parser with our errors."""


class RatCLI(LightningCLI):
    """A concrete model, any data module; checkpoints are written atomically and configs kept beside the logs."""

    def __init__(self, args: Sequence[str] | None, **kwargs: Any) -> None:
        super().__init__(
            LanguageModel,
            LightningDataModule,
            args=args,
            subclass_mode_data=True,
            parser_class=LightningParser,
            save_config_kwargs={"overwrite": True},
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
            given = [type(callback) for callback in _as_list(config.get("callbacks"))]
            if LastCheckpoint in given and Preemption not in given:
                callbacks = [*callbacks, Preemption()]
            elif Preemption not in given:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's reads the whole checkpoint for arguments to override, and the config is to decide."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """What the Trainer's method is called with. Raises ValueError where there is no last checkpoint to look at."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
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
    # Noise about Lightning's own insides, and advertisement.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    RatCLI(args)
