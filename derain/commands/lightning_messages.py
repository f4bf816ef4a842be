"""Filters for Lightning's messages and warnings."""

import logging
import re
import warnings
from pathlib import Path

SHOWN = re.compile(r"lightning/pytorch/(callbacks|tuner|profilers)/|signal_connector\.py$")
"""Files of Lightning whose messages are shown: configured callbacks, searches, signals of SLURM."""

SIGTERM = re.compile("An SIGTERMException was raised")
"""Hidden message: derain reports itself what stopped a run, and how to resume it."""


class MessageFilter(logging.Filter):
    """Hide Lightning's messages about seeds, absent devices, a product and signals."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show a message."""
        if not record.name.startswith("lightning"):  # the handler may be shared with other loggers
            return True
        if SIGTERM.match(str(record.msg)):
            return False
        return record.levelno >= logging.WARNING or bool(SHOWN.search(Path(record.pathname).as_posix()))


def choose_messages() -> None:
    """Show Lightning's messages about configured objects; hide warnings that are due to derain's own calls."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(message_filter, MessageFilter) for message_filter in handler.filters):
                handler.addFilter(MessageFilter())
    for message in (
        ".*args parameter is intended to run from within Python.*",
        ".*treespec, LeafSpec.*",
        ".*The dirpath has changed.*",
        ".*exists and is not empty. Previous log files.*",  # of another logger
        "Checkpoint directory .* exists and is not empty.",  # of any resumed run
        ".*is smaller than the logging interval.*",
        ".*You requested to overfit but enabled .* dataloader shuffling.*",  # Lightning turns it off itself
    ):
        warnings.filterwarnings("ignore", message)
    # PLNLIN-MCDDL steps a schedule before its optimiser in epochs of few batches.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
