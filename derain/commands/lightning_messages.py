"""Which of Lightning's messages and warnings are shown."""

import logging
import re
import warnings
from pathlib import Path

SHOWN = re.compile(r"lightning/pytorch/(callbacks|tuner|profilers)/|signal_connector\.py$")
"""Files whose messages a user asked for: callbacks that were configured, searches, SLURM's signals."""

SIGTERM = re.compile("An SIGTERMException was raised")
"""A message of callbacks that is not: derain reports what stopped a run, and how to resume it."""


class AskedFor(logging.Filter):
    """Hide what Lightning reports unasked: seeds, absent devices, a product, derain's own use of signals."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a message is shown."""
        if SIGTERM.match(str(record.msg)):
            return False
        return record.levelno >= logging.WARNING or bool(SHOWN.search(Path(record.pathname).as_posix()))


def choose_messages() -> None:
    """Show Lightning's messages about what was configured, and its warnings except those about our own calls."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(present, AskedFor) for present in handler.filters):
                handler.addFilter(AskedFor())
    for message in (
        ".*args parameter is intended to run from within Python.*",
        ".*treespec, LeafSpec.*",
        ".*The dirpath has changed.*",
        ".*exists and is not empty. Previous log files.*",  # another logger's
        "Checkpoint directory .* exists and is not empty.",  # of every run that is resumed
        ".*is smaller than the logging interval.*",
        ".*You requested to overfit but enabled .* dataloader shuffling.*",  # which turns it off
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # epochs below r batches
