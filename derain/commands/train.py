"""``derain fit``, ``validate``, ``test`` and ``predict``: one LightningCLI."""

import copy
import logging
import os
import re
import shlex
import signal
import subprocess
import traceback
from pathlib import Path
from pydoc import locate
from typing import Any, Literal, NoReturn, cast

import lightning
import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import LightningEnum, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from derain.checkpoints import remove_unfinished
from derain.commands.lightning_messages import choose_messages
from derain.commands.run_folders import restarts, root_of, run_folder, shared_folder
from derain.commands.run_setup import callbacks, check_options, check_trainer, loggers
from derain.data.datamodule import RainDataModule
from derain.errors import DerainError, Stopped
from derain.memory import keep_large_blocks
from derain.methods import DerainModule, DescribedModule, weights
from derain.methods.daclipsde.solvers import Sampling
from derain.metrics import resolve
from derain.metrics.perceptual import available_lpips
from derain.options import in_one_line, without_option

DENIED = [
    "torch.hub",
    "torch.jit.load",
    "torch.load",
    "torch.package",
    "torch.serialization",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
    "lightning.fabric.utilities.cloud_io",
]
"""What a configuration may not name, besides jsonargparse's own list: ways to run code or commands, or load pickles."""

log = logging.getLogger("derain")

COMMANDS = tuple(LightningCLI.subcommands())
LIGHTNING = Path(lightning.__file__).parent
TORCH = Path(torch.__file__).parent
REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, ImportError, MisconfigurationException)
"""What Lightning refuses options and callbacks with."""


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

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> Any:
        """Ask for ``--model`` in training only: files of weights and checkpoints name their method."""
        required = required and (nested_key != "model" or self.prog.endswith(" fit"))
        return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)

    def _load_config_parser_mode(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Any:
        """Take the section of this command from a configuration that has one for each, as LightningCLI writes them."""
        command = self.prog.rpartition(" ")[2]
        if command in COMMANDS:
            content = _section(content, command, path)
        return super()._load_config_parser_mode(content, path, *args, **kwargs)


def _section(content: str, command: str, path: Any) -> str:
    """Return the section of a command, or the configuration as it is where it has no sections.

    Raises:
        DerainError: If there are sections, but none of this command or something beside them.
    """
    try:
        loaded = yaml.safe_load(content)
    except yaml.YAMLError:  # what is wrong with it is reported by the parser
        return content
    commands = COMMANDS
    sections = [key for key in loaded if key in commands] if isinstance(loaded, dict) else []
    if not sections:
        return content
    others = [str(key) for key in loaded if key not in commands]
    if others:
        raise DerainError(
            f"--config {path}: {', '.join(others)} beside the section {sections[0]}; move it into the section"
        )
    if command not in loaded:
        raise DerainError(
            f"--config {path}: has sections {', '.join(sections)}, none {command}; add a section {command}"
        )
    return yaml.safe_dump(loaded[command] or {}, sort_keys=False)


class DerainCLI(LightningCLI):
    """Every run has a folder ``runs/EXPERIMENT/COMMAND-N`` of its own; ``--ckpt_path last`` goes on in the last one."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what is neither model nor data nor trainer."""
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="Weights by name (default, hub:OWNER/NAME) or file, ours or the authors' (of PReNet: "
            "FILE:stages=N,variant=NAME): fit starts from them; "
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
        """Leave the options as given: a file that is evaluated brings its method along as weights do."""

    def _set_seed(self) -> None:
        """Seed every run, since its order of images and its resuming depend on it.

        Raises:
            DerainError: If the seed is no number that generators accept.
        """
        seed = self.config[self.config.subcommand].seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise DerainError(
                f"--seed_everything {str(seed).lower()}: every run is seeded, so that it can be resumed and repeated; "
                f"give a number from 0 to {2**32 - 1}"
            )
        super()._set_seed()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuses to judge a network that was never trained, and files that are no checkpoints."""
        self.arguments = list(args)
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise DerainError("--config: a file is no text in UTF-8; give YAML") from error
        config = self.config[self.config.subcommand]
        self.protocols = tuple(protocol.name for protocol in resolve(config.protocol))
        if config.ckpt_path and config.ckpt_path != "last":
            own = cast(type[DescribedModule] | None, locate(config.model.class_path) if config.model else None)
            self.loaded = weights.load(Path(config.ckpt_path), own)  # says in one line what is wrong with the file
            if "derain checkpoint" not in self.loaded.note:
                note = self.loaded.note
                raise DerainError(f"--ckpt_path {config.ckpt_path}: {note}, no checkpoint; give it by --weights")
        if config.get("weights_only") is False:
            raise DerainError("--weights_only false: checkpoints are read without running code from them; leave it out")
        if config.get("return_predictions"):
            raise DerainError("--return_predictions true: images are written to files instead; leave it out")
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
        check_options(config.trainer, str(self.subcommand))
        if self.subcommand != "fit":
            self._evaluate_in_float32(config.trainer)
        given = any(argument.split("=")[0] == "--data.seed" for argument in self.arguments)
        if given and config.data.seed != config.seed_everything:
            raise DerainError(f"--data.seed {config.data.seed}: a run has one seed; give it by --seed_everything")
        config.data.seed = config.seed_everything
        files = [file for file in config.get("config") or [] if file]  # a configuration may be given as text
        first = Path(str(files[0])).stem if files else "derain"
        root = Path(config.trainer.default_root_dir or Path("runs") / first)
        self.root = root
        resuming = config.get("ckpt_path") == "last"
        self.folder = shared_folder(root, str(self.subcommand), resuming, self.arguments)
        config.trainer.default_root_dir = str(root_of(root))
        self.saved = copy.deepcopy(config)  # what repeats the run, in a folder of its own
        if resuming:
            self.saved.ckpt_path = None
        config.trainer.default_root_dir = str(self.folder)
        for logger in _as_list(config.trainer.logger):
            if getattr(logger, "init_args", {}).get("save_dir", "") in {None, "."}:
                logger.init_args.save_dir = str(self.folder)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            remove_unfinished(self.folder)
            for run in root_of(root).glob(f"{self.subcommand}-*"):
                remove_unfinished(run, age=3600.0)  # others may be writing still
        last = self.folder / "checkpoints" / "last.ckpt"
        again = last.is_file() and restarts() > 0
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

    def _evaluate_in_float32(self, trainer: Any) -> None:
        """Leave the precision of a training's configuration out; the command line may ask for another."""
        asked = any(argument.startswith("--trainer.precision") for argument in self.arguments)
        if trainer.precision in {None, 32, "32", "32-true"} or asked:
            return
        log.info("precision %s: for training; evaluating in 32-true (or give --trainer.precision)", trainer.precision)
        trainer.precision = "32-true"

    def instantiate_classes(self) -> None:
        """Builds data, method and trainer; the method comes from ``--weights`` where that is given."""
        config = self.config[self.subcommand]
        own = cast(type[DescribedModule] | None, locate(config.model.class_path) if config.model else None)
        if self.subcommand != "fit":
            config.model = None  # the file brings it
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps what a method refuses
            raise _innermost(error) from error
        if self.subcommand != "fit":
            if config.weights:
                self.loaded = weights.load(config.weights, own)
                log.info("%s: %s", config.weights, self.loaded.note)
            self.model = self.loaded.module
        self.model = cast(DescribedModule, self.model)
        begun_from = getattr(self.model, "begun_from", None) if self.subcommand == "fit" else None
        if begun_from and config.ckpt_path:
            log.info("--model.controller %s: ignored, since the run resumes from its checkpoint", begun_from)
        elif begun_from and config.weights:
            raise DerainError("--weights and --model.controller: either would be loaded over the other; give one")
        if config.weights and config.ckpt_path:
            log.info("--weights %s: ignored, since the run resumes from its checkpoint", config.weights)
        elif config.weights and self.subcommand == "fit":
            loaded = weights.load(config.weights, type(self.model))
            log.info("%s: %s", config.weights, loaded.note)
            self._start_from(loaded.module, config.weights)
        if isinstance(self.model, DerainModule):
            self.model.protocols = self.protocols
            self.model.lpips = available_lpips(config.lpips)
            self.model.explaining = bool(config.get("explain"))
            if self.config_init[self.subcommand].sampling is not None:
                self.model.sample_by(self.config_init[self.subcommand].sampling)
        elif self.subcommand in {"test", "predict"}:
            raise DerainError(
                f"derain {self.subcommand}: {type(self.model).__name__} restores no images; use derain validate, or "
                "give weights of a method"
            )
        log.info(
            "%s, %s trainable parameters; the run is saved to %s",
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
        self.model.begin_from(loaded)
        theirs, ours = dict(loaded.hparams), dict(self.model.hparams)
        both = [name for name in theirs if name in ours]
        others = [f"{name} {theirs[name]!r} → {ours[name]!r}" for name in both if theirs[name] != ours[name]]
        if others:
            log.info("settings that differ from those of the weights: %s", ", ".join(others))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the CSV log, checkpoints, pictures and results to whatever the configuration asks for."""
        command, config = str(self.subcommand), self.config_init[self.subcommand]
        config.trainer.logger = loggers(config.trainer.logger, self.folder, self.config[command].ckpt_path)
        monitor = self.model.judged_by if command == "fit" else ""
        config.trainer.callbacks = callbacks(
            _as_list(config.trainer.callbacks), command, config, self.folder, monitor, commit()
        )
        if not config.trainer.fast_dev_run:
            config.trainer.callbacks.append(SaveConfig(self._parser(command), self.saved, overwrite=True))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except REFUSALS as error:
            raise DerainError(f"--trainer: {' '.join(str(error).split())}") from error
        check_trainer(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command; what Lightning refuses while it runs takes one line.

        Raises:
            DerainError: If Lightning refuses an option or a callback.
            Stopped: If the run was interrupted by Ctrl-C or terminated.
        """
        try:
            super()._run_subcommand(subcommand)
        except REFUSALS as error:
            if isinstance(error, DerainError) or not _by_lightning(error):
                raise
            raise DerainError(f"--trainer: {' '.join(str(error).split())}") from error
        except SystemExit as stop:
            if isinstance(stop, SIGTERMException):
                raise Stopped(f"terminated{self._next_step()}", signal.SIGTERM) from stop
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise Stopped(f"interrupted{self._next_step()}") from stop
            raise

    def after_fit(self) -> None:
        """Log why a training stopped early, which Lightning does where ``verbose`` is set only."""
        for callback in self.trainer.early_stopping_callbacks:
            reason = callback.stopping_reason_message
            if reason and self.trainer.is_global_zero:
                log.info("EarlyStopping: stopped in epoch %d: %s", callback.stopped_epoch, reason)

    def _next_step(self) -> str:
        """Return what is left of a run that was stopped, and how to continue."""
        if self.subcommand == "predict":
            return f"; images restored so far are in {self.folder / 'images'}"
        if self.subcommand != "fit":
            return "; no results were written, since not all images were scored"
        if not (self.folder / "checkpoints" / "last.ckpt").is_file():
            return " before the first checkpoint; start again"
        resume = ["--ckpt_path", "last"]
        arguments = without_option(self.arguments, "--ckpt_path")
        if run_folder(self.root, "fit", resuming=True) != self.folder:  # last would be another run's
            arguments = without_option(arguments, "--trainer.default_root_dir")
            resume = ["--trainer.default_root_dir", str(self.folder), *resume]
        command = shlex.join(["derain", *arguments, *resume])
        return f" in epoch {self.trainer.current_epoch}; resume by: {command}"


def _as_list(configured: Any) -> list[Any]:
    """Return one or several configured objects as a list."""
    return [] if configured is None else configured if isinstance(configured, list) else [configured]


def _by_lightning(error: BaseException) -> bool:
    """Return whether Lightning itself raised an error, or found that a method lacks an attribute."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, AttributeError):  # a module's attributes are looked up in torch
        files = [file for file in files if not file.is_relative_to(TORCH)]
    return files[-1].is_relative_to(LIGHTNING)


def _innermost(error: BaseException) -> BaseException:
    """What a class refused, without what jsonargparse added to it."""
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in chain:
        chain.append(found)
        found = found.__cause__ or found.__context__
    ours = [one for one in chain if isinstance(one, DerainError)]
    if ours:
        return DerainError(str(ours[-1]).split(". Got value:")[0])
    foreign = [one for one in chain if isinstance(one, (*REFUSALS, ImportError)) and "Subtypes:" not in str(one)]
    if foreign:
        return DerainError(f"--trainer: {' '.join(str(foreign[-1]).split())}")
    return DerainError(in_one_line(str(error))) if "Subtypes:" in str(error) else error


def run(arguments: list[str]) -> int:
    """Runs a trainer command."""
    keep_large_blocks()
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not ours
    set_parsing_settings(import_path_denylist=DENIED)  # given a list, jsonargparse refuses instead of warning
    choose_messages()
    yaml.SafeDumper.add_multi_representer(LightningEnum, lambda dumper, value: dumper.represent_str(value.value))
    DerainCLI(
        DescribedModule,
        RainDataModule,
        subclass_mode_model=True,
        parser_class=OptionParser,
        save_config_callback=None,  # ours is among the callbacks
        trainer_defaults={
            "use_distributed_sampler": False,  # the data module has its own, exact ones
            "log_every_n_steps": 10,
            "enable_model_summary": False,
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "derain"} | {command: {"prog": f"derain {command}"} for command in COMMANDS},
        args=arguments,
    )
    return 0
