"""``derain fit``, ``validate``, ``test`` and ``predict``: one LightningCLI."""

import itertools
import logging
import os
import re
import signal
import subprocess
import warnings
from pathlib import Path
from pydoc import locate
from typing import Any, Literal, NoReturn, cast

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from derain.callbacks import BatchSeeds, FinalWeights, ImagePanels, LastCheckpoint, SaveImages, TestResults, Throughput
from derain.checkpoints import WholeCheckpointIO, remove_unfinished
from derain.data.datamodule import RainDataModule
from derain.errors import DerainError
from derain.memory import keep_large_blocks
from derain.methods import DerainModule, DescribedModule, weights
from derain.methods.daclipsde.solvers import Sampling
from derain.metrics import resolve
from derain.metrics.perceptual import lpips_at_hand
from derain.options import in_one_line

log = logging.getLogger("derain")


def commit() -> str | None:
    """The commit that the working directory is at, with ``-dirty`` where it was changed; None outside git."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of the run and sends it, with the commit, to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the loggers."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams({"config": config, "commit": commit()})
        (Path(trainer.default_root_dir) / "commit.txt").write_text(f"{commit()}\n")


class OptionParser(LightningArgumentParser):
    """Says in one line what is wrong with options and configurations."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuses.

        Raises:
            DerainError: Always.
        """
        if isinstance(ex, DerainError):  # a parser of a command has told already
            raise ex
        if not self.exit_on_error:  # of a class within a configuration, whose place the command's parser knows
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        if command == "derain":  # what a command misses is told by the parser of all
            named = re.search("(?:required: |Subcommand .)(validate|test|predict)", message)
            command += f" {named[1] if named else 'fit'}"
        told = in_one_line(message, parser._option_string_actions)
        raise DerainError(f"{told}; {command} --help tells the options") from ex


class DerainCLI(LightningCLI):
    """Every run has a folder ``runs/EXPERIMENT/COMMAND-N`` of its own; ``--ckpt_path last`` goes on in the last one."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is neither model nor data nor trainer."""
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="Weights by name (default, hub:OWNER/NAME) or file, ours or the authors': fit starts from them; "
            "validate, test and predict take the method from them too.",
        )
        parser.add_argument(
            "--protocol",
            type=list[str],
            default=["matlab-y"],
            help="How images are judged; the first one names the best checkpoint.",
        )
        parser.add_argument(
            "--lpips",
            type=Literal["auto", "alex", "vgg", "none"],
            default="auto" if parser.prog.endswith("test") else "none",
            help="Judge by LPIPS too; auto: if its weights are here.",
        )
        parser.add_argument(
            "--sampling",
            type=Sampling | None,
            default=None,
            help="How a method that samples does so; its own way by default.",
        )
        if parser.prog.endswith("predict"):
            parser.add_argument(
                "--explain",
                type=bool,
                default=False,
                help="Also write the maps of the method and what it perceived beside each image.",
            )

    def _parse_ckpt_path(self) -> None:
        """A file that is judged brings its method along; a training that goes on keeps to the options given."""
        if self.config.subcommand != "fit":
            super()._parse_ckpt_path()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuses to judge a network that was never trained, and files that are no checkpoints."""
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise DerainError("--config: a file is no text in UTF-8; give YAML") from error
        config = self.config[self.config.subcommand]
        self.protocols = tuple(protocol.name for protocol in resolve(config.protocol))
        if config.ckpt_path and config.ckpt_path != "last":
            own = cast(type[DescribedModule] | None, locate(config.model.class_path) if config.model else None)
            note = weights.load(Path(config.ckpt_path), own).note  # says in one line what is wrong with the file
            if "derain checkpoint" not in note:
                raise DerainError(f"--ckpt_path {config.ckpt_path}: {note}, no checkpoint; give it by --weights")
        if config.ckpt_path and config.weights and self.config.subcommand != "fit":
            raise DerainError("--weights and --ckpt_path: either would be loaded over the other; give one of them")
        if not config.ckpt_path and not config.weights and self.config.subcommand != "fit":
            raise DerainError(
                f"derain {self.config.subcommand}: no weights given; add --weights default or --weights FILE (ours or "
                "the authors') or --ckpt_path FILE"
            )

    def before_instantiate_classes(self) -> None:
        """Chooses the folder of the run."""
        config = self.config[self.subcommand]
        config.data.seed = config.seed_everything if isinstance(config.seed_everything, int) else 0
        first = Path(str(config.config[0])).stem if config.get("config") else "derain"
        root = Path(config.trainer.default_root_dir or Path("runs") / first)
        resuming = config.get("ckpt_path") == "last"
        self.folder = shared_folder(root, str(self.subcommand), resuming)
        config.trainer.default_root_dir = str(self.folder)
        configured = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        for logger in configured:
            if "save_dir" in getattr(logger, "init_args", {}):
                logger.init_args.save_dir = str(self.folder)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            remove_unfinished(self.folder)
            for run in root.glob(f"{self.subcommand}-*"):
                remove_unfinished(run, age=3600.0)  # others may be writing still
        last = self.folder / "checkpoints" / "last.ckpt"
        again = last.is_file() and int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
        if resuming or again:  # SLURM started the job again, in the folder that it has
            config.ckpt_path = str(last)
            weights.read(last)  # says in one line if it is damaged
        elif last.is_file():
            raise DerainError(f"{self.folder}: holds a run of this job; start each by srun, or add --ckpt_path last")
        if "weights_only" in config:
            config.weights_only = True
        if self.subcommand == "test":
            config.verbose = False  # our table stands for Lightning's
        if self.subcommand == "predict":
            config.return_predictions = False  # they are written, and would fill the memory

    def instantiate_classes(self) -> None:
        """Builds data, method and trainer; the method comes from ``--weights`` where that is given."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps what a method refuses
            raise _innermost(error) from error
        config = self.config[self.subcommand]
        self.model = cast(DescribedModule, self.model)
        begun_from = getattr(self.model, "begun_from", None)
        if begun_from and config.ckpt_path:
            log.info("--model.controller %s: left out, since the run goes on from its checkpoint", begun_from)
        elif begun_from and config.weights:
            raise DerainError("--weights and --model.controller: either would be loaded over the other; give one")
        if config.weights and config.ckpt_path:
            log.info("--weights %s: left out, since the run goes on from its checkpoint", config.weights)
        elif config.weights:
            loaded = weights.load(weights.locate(config.weights), type(self.model))
            log.info("%s: %s", config.weights, loaded.note)
            if self.subcommand == "fit":
                self._start_from(loaded.module, config.weights)
            else:
                self.model = loaded.module
        if isinstance(self.model, DerainModule):
            self.model.protocols = self.protocols
            self.model.lpips = lpips_at_hand(config.lpips)
            self.model.explaining = bool(config.get("explain"))
            if self.config_init[self.subcommand].sampling is not None:
                self.model.sample_by(self.config_init[self.subcommand].sampling)
        elif self.subcommand in {"test", "predict"}:
            raise DerainError(
                f"derain {self.subcommand}: {type(self.model).__name__} restores no images; use derain validate, or "
                "give weights of a method"
            )
        log.info(
            "%s, %s trainable parameters; the run is kept in %s",
            type(self.model).__name__,
            f"{self.model.parameter_count:,}",
            self.folder,
        )

    def _start_from(self, loaded: DescribedModule, path: str) -> None:
        state, own = loaded.network.state_dict(), self.model.network.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise DerainError(
                f"--weights {path}: holds {type(loaded).__name__} {dict(loaded.hparams)}, which does not fit the "
                f"configured {type(self.model).__name__}; configure the same network"
            )
        self.model.network.load_state_dict(state)
        theirs, ours = dict(loaded.hparams), dict(self.model.hparams)
        both = [name for name in theirs if name in ours]
        others = [f"{name} {theirs[name]!r} → {ours[name]!r}" for name in both if theirs[name] != ours[name]]
        if others:
            log.info("settings that differ from those of the weights: %s", ", ".join(others))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the CSV log, checkpoints, pictures and results to whatever the configuration asks for."""
        config = self.config_init[self.subcommand].trainer
        config.logger = self._loggers(config.logger)
        config.callbacks = [*(config.callbacks or []), *self._callbacks(config)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:  # what Lightning refuses
            raise DerainError(f"--trainer: {' '.join(str(error).split())}") from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        if configured is False:
            return False
        given = configured if isinstance(configured, list) else [configured]
        csv = CSVLogger(str(self.folder), name="", version="", flush_logs_every_n_steps=10)
        past, checkpoint = self.folder / "metrics.csv", self.config[self.subcommand].ckpt_path
        if past.exists() and checkpoint and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            _keep_history(csv, past, Path(checkpoint))
        return [csv, *(logger for logger in given if isinstance(logger, Logger))]

    def _callbacks(self, trainer: Any) -> list[Callback]:
        config = self.config[self.subcommand]
        callbacks: list[Callback] = [RichProgressBar(leave=False)] if trainer.enable_progress_bar is not False else []
        if self.subcommand == "test":
            callbacks += [TestResults(config.weights, commit()), ImagePanels()]
        if self.subcommand == "predict":
            callbacks.append(SaveImages())
        if self.subcommand != "fit":
            return callbacks
        seed = config.seed_everything
        callbacks += [BatchSeeds(seed if isinstance(seed, int) else 0), ImagePanels()]
        if trainer.enable_checkpointing is not False:
            kept: dict[str, Any] = {"enable_version_counter": False, "dirpath": self.folder / "checkpoints"}
            callbacks += [
                ModelCheckpoint(filename="best", monitor=self.model.judged_by, mode="max", **kept),
                LastCheckpoint(**kept),
                FinalWeights(),
            ]
        if trainer.logger is not False:
            callbacks += [Throughput(), LearningRateMonitor("epoch")]
        return callbacks


def _innermost(error: BaseException) -> BaseException:
    """What derain itself said, if it did, without what jsonargparse added."""
    found: BaseException | None = error
    told = error
    while found is not None:
        if isinstance(found, DerainError):
            told = DerainError(str(found).split(". Got value:")[0])
        found = found.__cause__ or found.__context__
    return told


def shared_folder(root: Path, command: str, resuming: bool) -> Path:
    """The folder of the run, one for all its ranks.

    Ranks of torchrun learn it from rank 0 through torchrun's store, those of SLURM have the id of their job in common,
    and those that Lightning starts find it in the environment.
    """
    variables = os.environ
    by_torchrun, by_slurm = "TORCHELASTIC_RUN_ID" in variables, int(variables.get("SLURM_NTASKS", 1)) > 1
    if resuming and (by_torchrun or by_slurm):
        return run_folder(root, command, resuming)
    if by_torchrun:
        store = TCPStore(variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), is_master=False)
        key = f"derain-{variables['TORCHELASTIC_RESTART_COUNT']}"
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            store.set(key, str(run_folder(root, command, resuming)))
        folder = Path(store.get(key).decode())
        folder.mkdir(parents=True, exist_ok=True)  # nodes may have disks of their own
        return folder
    if by_slurm:
        step = variables.get("SLURM_STEP_ID", "0")
        folder = root / f"{command}-{variables['SLURM_JOB_ID']}{'' if step == '0' else f'.{step}'}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if variables.get("LOCAL_RANK", "0") != "0":
        return Path(variables["DERAIN_RUN"])
    folder = run_folder(root, command, resuming)
    variables["DERAIN_RUN"] = str(folder)
    return folder


def run_folder(root: Path, command: str, resuming: bool) -> Path:
    """A new folder ``root/COMMAND-N``, made at once so that no other run takes it, or the last one to resume.

    Raises:
        DerainError: If there is nothing to resume.
    """
    runs = list(root.glob(f"{command}-*"))
    numbered = [int(number) for path in runs if (number := path.name.rsplit("-", 1)[1]).isdecimal()]
    if not resuming:
        for free in itertools.count(max(numbered, default=0) + 1):
            folder = root / f"{command}-{free}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:  # another run has just taken it
                continue
            return folder
    files = [path / "checkpoints" / "last.ckpt" for path in runs]
    saved = {file: file.stat().st_mtime for file in files if file.is_file()}
    if not saved:
        raise DerainError(f"--ckpt_path last: no {command}-N/checkpoints/last.ckpt in {root}; start without it")
    return max(saved, key=lambda file: saved[file]).parents[1]


def _keep_history(csv: CSVLogger, past: Path, checkpoint: Path) -> None:
    """Lets a resumed run append to its metrics, from the checkpoint's step on (the logger would delete them).

    Of a file that was cut off while the logger wrote it anew, what is whole is kept.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    loops = content["loops"]["fit_loop"]
    position = {"steps": loops["epoch_loop.state_dict"]["_batches_that_stepped"], "log": {}}  # as loggers count
    position = content.get("position", position)
    header, *rows = past.read_text().splitlines() or [""]
    columns = header.split(",")
    if "step" not in columns:
        log.warning("%s was cut off when the run broke off: its metrics begin anew", past)
        return
    place = columns.index("step")
    whole = [row for row in rows if row.count(",") == header.count(",") and row.split(",")[place].isdecimal()]
    again = [columns.index(name) for name in position["log"] if name in columns and name != "epoch"]

    def keep(values: list[str]) -> bool:
        step = int(values[place])  # what was logged after the checkpoint was saved is logged again
        return step < position["steps"] - 1 or (
            step == position["steps"] - 1 and not any(values[index] for index in again)
        )

    kept = [row for row in whole if keep(row.split(","))]
    experiment = csv.experiment
    past.write_text("\n".join([header, *kept]) + "\n")
    experiment.metrics_keys = header.split(",")


def run(arguments: list[str]) -> int:
    """Runs a trainer command."""
    keep_large_blocks()
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not ours
    # What Lightning says besides warnings: seeds, devices that are absent, a product.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*The dirpath has changed.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty. Previous log files.*")  # another logger's
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # epochs below r batches
    try:
        run_cli(arguments)
    except SIGTERMException:
        log.warning("stopped by SIGTERM; resume by --ckpt_path last")
        return 128 + signal.SIGTERM
    return 0


def run_cli(arguments: list[str]) -> None:
    """Run the command that the arguments name."""
    DerainCLI(
        DescribedModule,
        RainDataModule,
        subclass_mode_model=True,
        parser_class=OptionParser,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "use_distributed_sampler": False,  # the data module has its own, exact ones
            "log_every_n_steps": 10,
            "enable_model_summary": False,
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "derain", "predict": {"prog": "derain predict"}},
        args=arguments,
    )
