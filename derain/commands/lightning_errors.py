"""Errors that Lightning and jsonargparse raise for wrong options, as one-line messages."""

import traceback
from pathlib import Path

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from derain.config_errors import explain_config_error
from derain.errors import DerainError

LIGHTNING_FOLDER = Path(lightning.__file__).parent
TORCH_FOLDER = Path(torch.__file__).parent
LIGHTNING_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, ImportError, MisconfigurationException)
"""Exceptions that Lightning raises for options and callbacks that it rejects."""


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks."""
    return " ".join(str(error).split())


def raised_by_lightning(error: BaseException) -> bool:
    """Return whether code of Lightning raised an error, for example because a method lacks an attribute."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, AttributeError):  # for a missing attribute of a module, torch raises it
        files = [file for file in files if not file.is_relative_to(TORCH_FOLDER)]
    return files[-1].is_relative_to(LIGHTNING_FOLDER)


def original_error(error: BaseException) -> BaseException:
    """Return the error that a constructor raised, without the text that jsonargparse added.

    Args:
        error: Error of jsonargparse, usually raised from that of the constructor.

    Returns:
        A `DerainError` with the message of the constructor's error, or, if a value had none of the accepted types, an
        explanation of jsonargparse's error. In all other cases, ``error`` itself.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    own_errors = [cause for cause in chain if isinstance(cause, DerainError)]
    if own_errors:
        return DerainError(str(own_errors[-1]).split(". Got value:")[0])
    other_errors = [cause for cause in chain if isinstance(cause, LIGHTNING_ERRORS) and "Subtypes:" not in str(cause)]
    if other_errors:
        return DerainError(f"--trainer: {one_line(other_errors[-1])}")
    if "Subtypes:" in str(error):
        return DerainError(explain_config_error(str(error)))
    return error
