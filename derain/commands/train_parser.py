"""Parser of ``derain fit``, ``validate``, ``test`` and ``predict``, with one-line error messages."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from derain.config_errors import explain_config_error
from derain.errors import DerainError

COMMANDS = tuple(LightningCLI.subcommands())
"""``fit``, ``validate``, ``test`` and ``predict``."""

DENIED_IMPORTS = [
    "torch.hub",
    "torch.jit.load",
    "torch.load",
    "torch.package",
    "torch.serialization",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
    "lightning.fabric.utilities.cloud_io",
]
"""Import paths that a configuration must not name, since they run code or load pickles.

jsonargparse denies further paths by default.
"""


class OptionParser(LightningArgumentParser):
    """LightningCLI's parser, with one-line error messages."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a one-line error.

        Raises:
            DerainError: Always, except that the parser of a nested class raises jsonargparse's error: the command's
                parser reports it with the full name of the option.
        """
        if isinstance(ex, DerainError):  # the message is complete
            raise ex
        if not self.exit_on_error:  # the parser of a nested class
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        if command == "derain":  # the top-level parser reports the missing options of a command
            subcommand = re.search("(?:required: |Subcommand .)(validate|test|predict)", message)
            command += f" {subcommand[1] if subcommand else 'fit'}"
        problem = explain_config_error(message, parser._option_string_actions)
        raise DerainError(f"{problem}; see {command} --help for all options") from ex

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> Any:
        """Add the options of a class; only ``fit`` requires ``--model``, since weights files record their method."""
        required = required and (nested_key != "model" or self.prog.endswith(" fit"))
        return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)

    def _load_config_parser_mode(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Any:
        """Load a configuration, or the section for this command if the configuration has sections."""
        command = self.prog.rpartition(" ")[2]
        if command in COMMANDS:
            content = _section(content, command, path)
        return super()._load_config_parser_mode(content, path, *args, **kwargs)


def _section(content: str, command: str, path: Any) -> str:
    """Return the section of a configuration for a command, or the whole configuration if it has no sections.

    Raises:
        DerainError: If the configuration has sections, but none for this command, or also has keys outside sections.
    """
    try:
        loaded = yaml.safe_load(content)
    except yaml.YAMLError:  # reported by the parser
        return content
    if not isinstance(loaded, dict):
        return content
    sections = [key for key in loaded if key in COMMANDS]
    if not sections:
        return content
    unsectioned = [str(key) for key in loaded if key not in COMMANDS]
    if unsectioned:
        raise DerainError(
            f"--config {path}: {', '.join(unsectioned)} outside of the section {sections[0]}; move them into the "
            "section"
        )
    if command not in loaded:
        raise DerainError(f"--config {path}: no section {command}, only {', '.join(sections)}; add a section {command}")
    return yaml.safe_dump(loaded[command] or {}, sort_keys=False)


def model_class_paths(arguments: Sequence[str]) -> list[str]:
    """Return the class paths in ``--model`` options and in ``model`` of configuration files.

    A class path contains a dot, such as ``my_method.MyModule``; names of classes without a module are omitted. Values
    that cannot be read are ignored, since the parser reports them later.

    Args:
        arguments: Command and options, not yet parsed.

    Example:
        >>> model_class_paths(["fit", "--model=my_method.MyModule", "--model", "PReNetModule"])
        ['my_method.MyModule']
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    models = []
    for option, value in pairwise(words):
        if option in {"--model", "--model.class_path"}:
            models.append(_read_yaml(value))
        elif option in {"--config", "-c"}:
            configuration = _read_configuration(Path(value))
            section = configuration.get(arguments[0])
            models += [part.get("model") for part in (configuration, section) if isinstance(part, dict)]
    paths = [model.get("class_path") if isinstance(model, dict) else model for model in models]
    return [path for path in paths if isinstance(path, str) and "." in path]


def _read_configuration(path: Path) -> dict[str, Any]:
    try:
        content = _read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None
