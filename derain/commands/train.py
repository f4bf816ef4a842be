"""``derain fit``, ``validate``, ``test`` and ``predict``, built on LightningCLI."""

import copy
import logging
import os
import shlex
import signal
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from jsonargparse import set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import LightningEnum, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from derain.batching import check_tile
from derain.checkpoints import remove_unfinished
from derain.commands.lightning_errors import LIGHTNING_ERRORS, one_line, original_error, raised_by_lightning
from derain.commands.lightning_messages import filter_lightning_messages
from derain.commands.ranks import Ranks, SignalConnector
from derain.commands.run_folders import restarts, root_of, run_folder, shared_folder
from derain.commands.run_setup import check_options, check_trainer, commit, configured_loggers, run_callbacks
from derain.commands.train_parser import DENIED_IMPORTS, OptionParser, model_class_paths
from derain.data.datamodule import RainDataModule
from derain.errors import DerainError, Stopped
from derain.files.weights import read
from derain.methods import DerainModule, TrainableModule, catalog
from derain.methods.interfaces import Sampling
from derain.methods.registry import add_current_folder, methods, use_method
from derain.metrics import resolve
from derain.metrics.perceptual import available_lpips
from derain.metrics.temporal import split_temporal
from derain.options import without_option
from derain.restoration import require_explains, set_sampling

log = logging.getLogger("derain")


class SaveConfig(SaveConfigCallback):
    """Save ``config.yaml`` and ``commit.txt`` to the folder of the run; send their contents to all loggers but CSV."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Send the configuration and the commit to all loggers but CSV, and save ``commit.txt``."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams({"config": config, "commit": commit()})
        (Path(trainer.default_root_dir) / "commit.txt").write_text(f"{commit()}\n")


def _model_class(config: Any) -> type[TrainableModule] | None:
    """Register and return the class that ``--model`` names; None without the option.

    If ``--model.network`` is a class path, that class is registered, too.
    """
    if not config.model:
        return None
    network = (config.model.get("init_args") or {}).get("network")
    if isinstance(network, str) and "." in network:
        use_method(network, "--model.network")  # registers classes of networks, too
    return cast(type[TrainableModule], use_method(config.model.class_path, "model"))


class DerainCLI(LightningCLI):
    """LightningCLI with a folder for each run: by default ``runs/EXPERIMENT/COMMAND-N``.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        **kwargs: Arguments of LightningCLI.
    """

    def __init__(self, command: str, **kwargs: Any) -> None:
        self.command = command
        self.ranks = Ranks(self._next_step)
        super().__init__(**kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return only this command, since LightningCLI would build the parsers of all commands.

        The value contains the arguments of the trainer's method, such as ``Trainer.test``, that are not options.
        """
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that belong to neither model nor data nor trainer."""
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="Weights to load: a name from derain models list, hub:OWNER/NAME, or a file of derain or of a "
            "method's authors (PReNet: FILE:stages=N,variant=NAME). fit starts from them; validate, test and predict "
            "run their method.",
        )
        parser.add_argument(
            "--protocol",
            type=list[str],
            default=["matlab-y"],
            help="Protocols of PSNR and SSIM (derain score --help lists them); fit selects the best checkpoint by PSNR "
            "under the first; temporal, for test only, adds flicker and warping error of videos.",
        )
        parser.add_argument(
            "--lpips",
            type=Literal["auto", "alex", "vgg", "none"],
            default="auto" if parser.prog.endswith("test") else "none",
            help="Network of LPIPS; auto is alex if its weights are on this machine, else none; alex and vgg download "
            "missing weights.",
        )
        parser.add_argument(
            "--sampling",
            type=Sampling | None,
            default=None,
            help="Solver, steps and seed of a method that samples, such as DA-CLIP + IR-SDE (default: its own).",
        )
        if parser.prog.endswith(("test", "predict")):
            parser.add_argument(
                "--tile",
                type=int | Literal["auto"] | None,
                default=None,
                help="Side of tiles in pixels, at least 64; or auto: tiles only if memory is short (default: whole "
                "images). Tiles change scores slightly.",
            )
        if parser.prog.endswith("predict"):
            parser.add_argument(
                "--explain",
                type=bool,
                default=False,
                help="Also save NAME-explain.png and .json with the method's maps, route and scores.",
            )

    def _parse_ckpt_path(self) -> None:
        """Do nothing: LightningCLI would replace given options by the hyper-parameters of the checkpoint."""

    def _set_seed(self) -> None:
        """Seed the run.

        Raises:
            DerainError: If the seed is not a whole number from 0 to 2**32 - 1.
        """
        seed = self.config[self.config.subcommand].seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise DerainError(
                f"--seed_everything {str(seed).lower()}: must be a whole number from 0 to {2**32 - 1}; a run needs a "
                "seed to be resumed and repeated"
            )
        super()._set_seed()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options, and load the checkpoint of ``--ckpt_path FILE``.

        Raises:
            DerainError: If an option is invalid, the checkpoint cannot be loaded, or no weights to evaluate are given.
        """
        self.arguments = list(args)
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise DerainError("--config: a file is not UTF-8 text; give a YAML file") from error
        config = self.config[self.config.subcommand]
        names, self.temporal = split_temporal(config.protocol, supported=self.config.subcommand == "test")
        self.protocols = tuple(protocol.name for protocol in resolve(names))
        if config.ckpt_path and config.ckpt_path != "last":
            self._load_checkpoint(config)
        if config.get("weights_only") is False:
            raise DerainError("--weights_only false: not supported, since loading pickles can run code; omit it")
        if config.get("return_predictions"):
            raise DerainError("--return_predictions true: not supported, since images are saved to files; omit it")
        if self.config.subcommand != "fit":
            self._check_evaluated_file(config)
            check_tile(config.get("tile"))

    def _load_checkpoint(self, config: Any) -> None:
        """Load the method of ``--ckpt_path FILE``, to evaluate it or, for ``fit``, to report a damaged file early."""
        self.loaded = catalog.load_checkpoint(Path(config.ckpt_path), _model_class(config))

    def _check_evaluated_file(self, config: Any) -> None:
        """Check that either ``--weights`` or ``--ckpt_path FILE`` is given, not both.

        Raises:
            DerainError: If neither or both are given, or ``--ckpt_path`` is ``last``.
        """
        if config.ckpt_path == "last":
            raise DerainError(
                f"--ckpt_path last: derain {self.config.subcommand} cannot resume a run; expected a file; use "
                "--ckpt_path RUN/checkpoints/last.ckpt"
            )
        if config.ckpt_path and config.weights:
            raise DerainError(
                f"--weights {config.weights} and --ckpt_path {config.ckpt_path}: only one of them can be evaluated; "
                "omit the other"
            )
        if not config.ckpt_path and not config.weights:
            raise DerainError(
                f"derain {self.config.subcommand}: no weights given; add --weights default, --weights FILE or "
                "--ckpt_path FILE"
            )

    def before_instantiate_classes(self) -> None:
        """Check the trainer's options; set precision, seed, folder and checkpoint of the run.

        Raises:
            DerainError: If an option is invalid, there is no run to resume, or its checkpoint is damaged.
        """
        config = self.config[self.subcommand]
        check_options(config.trainer, str(self.subcommand))
        if self.subcommand != "fit":
            self._evaluate_in_float32(config.trainer)
        self._use_one_seed(config)
        self._choose_folder(config)
        self._choose_checkpoint(config)
        if "weights_only" in config:
            config.weights_only = True
        if self.subcommand == "test":
            config.verbose = False  # TestResults prints the table
        if self.subcommand == "predict":
            config.return_predictions = False  # SaveImages saves the images, which may not fit into memory together

    def _evaluate_in_float32(self, trainer: Any) -> None:
        """Evaluate in float32 unless the command line sets a precision: configurations set it for training."""
        on_command_line = any(argument.startswith("--trainer.precision") for argument in self.arguments)
        if trainer.precision in {None, 32, "32", "32-true"} or on_command_line:
            return
        log.info(
            "precision %s: ignored, since it is for training; evaluating in 32-true (override with "
            "--trainer.precision)",
            trainer.precision,
        )
        trainer.precision = "32-true"

    def _use_one_seed(self, config: Any) -> None:
        """Set the seed of the data module to that of the run; refuse another one on the command line."""
        on_command_line = any(argument.split("=")[0] == "--data.seed" for argument in self.arguments)
        if on_command_line and config.data.seed != config.seed_everything:
            raise DerainError(
                f"--data.seed {config.data.seed}: differs from --seed_everything {config.seed_everything}; give "
                "--seed_everything alone"
            )
        config.data.seed = config.seed_everything

    def _choose_folder(self, config: Any) -> None:
        """Choose the folder of the run and the content of its ``config.yaml``; remove temporary files of old runs.

        Raises:
            DerainError: If there is no run to resume.
        """
        files = [file for file in config.get("config") or [] if file]  # None if --config is YAML text
        experiment = Path(str(files[0])).stem if files else "derain"
        self.root = Path(config.trainer.default_root_dir or Path("runs") / experiment)
        resume_last = config.get("ckpt_path") == "last"
        self.folder = shared_folder(self.root, str(self.subcommand), resume_last, self.arguments)
        # With the saved configuration, a user can repeat the run from its start, in a new folder.
        config.trainer.default_root_dir = str(root_of(self.root))
        self.saved = copy.deepcopy(config)
        if resume_last:
            self.saved.ckpt_path = None
        config.trainer.default_root_dir = str(self.folder)
        for logger in _as_list(config.trainer.logger):
            if getattr(logger, "init_args", {}).get("save_dir", "") in {None, "."}:
                logger.init_args.save_dir = str(self.folder)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            remove_unfinished(self.folder)
            for run in root_of(self.root).glob(f"{self.subcommand}-*"):
                remove_unfinished(run, age=3600.0)  # a run may be writing newer files

    def _choose_checkpoint(self, config: Any) -> None:
        """Resume from ``last.ckpt`` if ``--ckpt_path`` is ``last``, or if it exists and SLURM has restarted the job.

        Raises:
            DerainError: If the checkpoint is damaged, or the folder contains another run of the same SLURM job.
        """
        last = self.folder / "checkpoints" / "last.ckpt"
        restarted = last.is_file() and restarts() > 0
        if config.get("ckpt_path") == "last" or restarted:
            config.ckpt_path = str(last)
            read(last)
        elif last.is_file():
            raise DerainError(
                f"{self.folder}: already contains a run of this job; start each run by srun, or add --ckpt_path last "
                "to resume it"
            )

    def instantiate_classes(self) -> None:
        """Build data, method and trainer; load initial weights, or the weights to evaluate.

        Raises:
            DerainError: If an option is invalid, or weights cannot be loaded.
        """
        config = self.config[self.subcommand]
        model_class = _model_class(config)
        if self.subcommand != "fit":
            config.model = None  # built from its weights or checkpoint
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps the errors of constructors
            raise original_error(error) from error
        if self.subcommand == "fit":
            self._load_initial_weights(config)
        else:
            if config.weights:
                self.loaded = catalog.load(config.weights, model_class)
                log.info("%s: %s", config.weights, self.loaded.note)
            self.model = self.loaded.module
        self.model = cast(TrainableModule, self.model)
        self._configure_evaluation(config)
        log.info(
            "%s: %s trainable parameters; saving the run to %s",
            self.model.title,
            f"{self.model.parameter_count:,}",
            self.folder,
        )

    def _load_initial_weights(self, config: Any) -> None:
        """Load ``--weights`` into the configured method, unless the run resumes from a checkpoint.

        Raises:
            DerainError: If the weights cannot be loaded or belong to another network, or an option of the method loads
                weights as well.
        """
        options = [f"--model.{name} {file}" for name, file in self.model.initial_weights.items()]
        if config.weights:
            options.insert(0, f"--weights {config.weights}")
        if config.ckpt_path:
            for option in options:
                log.info("%s: ignored: resuming from a checkpoint", option)
            return
        if len(options) > 1:
            raise DerainError(f"{' and '.join(options)}: both initialise the network; omit one of them")
        if not config.weights:
            return
        initial = catalog.load(config.weights, type(self.model))
        log.info("%s: %s", config.weights, initial.note)
        self._start_from(initial.module, config.weights)

    def _start_from(self, initial: TrainableModule, weights: str) -> None:
        """Copy the weights of a loaded method to the configured one; log hyper-parameters that differ.

        Args:
            initial: Loaded method.
            weights: Value of ``--weights``, for messages.

        Raises:
            DerainError: If the networks have different tensors.
        """
        state, own_state = initial.network.state_dict(), self.model.network.state_dict()
        shapes, own_shapes = ({name: value.shape for name, value in tensors.items()} for tensors in (state, own_state))
        if shapes != own_shapes:
            raise DerainError(
                f"--weights {weights}: {type(initial).__name__} {dict(initial.hparams)} does not fit the configured "
                f"{type(self.model).__name__}; configure the same network, or give other weights"
            )
        self.model.network.load_state_dict(state)
        self.model.start_from(initial)
        own_options = self.model.hparams
        differences = [
            f"{name} {value!r} → {own_options[name]!r}"
            for name, value in initial.hparams.items()
            if name in own_options and own_options[name] != value
        ]
        if differences:
            log.info("hyper-parameters that differ from those of the weights: %s", ", ".join(differences))

    def _configure_evaluation(self, config: Any) -> None:
        """Set how the method scores, samples and explains images.

        Raises:
            DerainError: If the method does not support ``--explain`` or ``--sampling``, or if the command is ``test``
                or ``predict`` and the method does not restore images.
        """
        if isinstance(self.model, DerainModule):
            self.model.protocols, self.model.temporal = self.protocols, self.temporal
            self.model.lpips = available_lpips(config.lpips)
            if config.get("explain"):
                require_explains(self.model).explaining = True
            sampling = self.config_init[self.subcommand].sampling
            if sampling is not None:
                set_sampling(self.model, sampling)
        elif self.subcommand in {"test", "predict"}:
            raise DerainError(
                f"derain {self.subcommand}: {type(self.model).__name__} restores no images; use derain validate, or "
                "give the weights of another method"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with derain's loggers and callbacks.

        Raises:
            DerainError: If Lightning or derain rejects an option of the trainer.
        """
        command, config = str(self.subcommand), self.config_init[self.subcommand]
        config.trainer.logger = configured_loggers(config.trainer.logger, self.folder, self.config[command].ckpt_path)
        monitor = self.model.monitor if command == "fit" else ""
        config.trainer.callbacks = run_callbacks(
            _as_list(config.trainer.callbacks), command, config, self.folder, monitor, commit()
        )
        if not config.trainer.fast_dev_run:
            config.trainer.callbacks.append(SaveConfig(self._parser(command), self.saved, overwrite=True))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except LIGHTNING_ERRORS as error:
            raise DerainError(f"--trainer: {one_line(error)}") from error
        trainer._signal_connector = SignalConnector(trainer)
        check_trainer(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command.

        Raises:
            DerainError: If Lightning rejects an option or a callback during the run, or another rank has died.
            Stopped: If Ctrl-C or SIGTERM stopped the run.
        """
        try:
            with self.ranks:
                super()._run_subcommand(subcommand)
        except LIGHTNING_ERRORS as error:
            if isinstance(error, DerainError) or not raised_by_lightning(error):
                raise
            raise DerainError(f"--trainer: {one_line(error)}") from error
        except SystemExit as stop:
            if isinstance(stop, SIGTERMException):
                raise Stopped(f"terminated{self._next_step()}", signal.SIGTERM) from stop
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise Stopped(f"interrupted{self._next_step()}") from stop
            raise

    def after_fit(self) -> None:
        """Log why early stopping ended the training, which Lightning does only if ``verbose`` is set."""
        for callback in self.trainer.early_stopping_callbacks:
            reason = callback.stopping_reason_message
            if reason and self.trainer.is_global_zero:
                log.info("EarlyStopping: stopped in epoch %d: %s", callback.stopped_epoch, reason)

    def _next_step(self) -> str:
        """Return the end of a message about a stopped run, after words such as "terminated": what to do next."""
        if self.subcommand == "predict":
            return f"; images restored so far are in {self.folder / 'images'}"
        if self.subcommand != "fit":
            return "; no results were saved, since not all images were scored"
        if not (self.folder / "checkpoints" / "last.ckpt").is_file():
            return " before the first checkpoint; start again"
        resume = ["--ckpt_path", "last"]
        arguments = without_option(self.arguments, "--ckpt_path")
        if run_folder(self.root, "fit", resuming=True) != self.folder:  # "last" would resume another run
            arguments = without_option(arguments, "--trainer.default_root_dir")
            resume = ["--trainer.default_root_dir", str(self.folder), *resume]
        command = shlex.join(["derain", *arguments, *resume])
        return f" in epoch {self.trainer.current_epoch}; resume with: {command}"


def _as_list(configured: Any) -> list[Any]:
    """Return a configured object as a list: a list is unchanged, and None becomes an empty list."""
    if configured is None:
        return []
    return configured if isinstance(configured, list) else [configured]


def run(arguments: list[str]) -> int:
    """Run ``derain fit``, ``validate``, ``test`` or ``predict``.

    Args:
        arguments: The command and its options.

    Returns:
        The exit code 0.

    Raises:
        DerainError: If an option is invalid, or the run cannot start or continue.
        Stopped: If Ctrl-C or SIGTERM stopped the run.
    """
    for class_path in model_class_paths(arguments):
        add_current_folder(class_path)
    methods()  # imports them, so that --model finds them by class name
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about calls in Lightning
    # Without this call, jsonargparse only warns of import paths that it denies.
    set_parsing_settings(import_path_denylist=DENIED_IMPORTS)
    filter_lightning_messages()
    yaml.SafeDumper.add_multi_representer(LightningEnum, lambda dumper, value: dumper.represent_str(value.value))
    command = arguments[0]
    parser_options: dict[str, Any] = {"prog": "derain", command: {"prog": f"derain {command}"}}
    DerainCLI(
        command,
        model_class=TrainableModule,
        datamodule_class=RainDataModule,
        subclass_mode_model=True,
        parser_class=OptionParser,
        save_config_callback=None,  # instantiate_trainer adds SaveConfig
        trainer_defaults={
            "use_distributed_sampler": False,  # the data module has its own samplers
            "log_every_n_steps": 10,
            "enable_model_summary": False,
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs=parser_options,
        args=arguments,
    )
    return 0
