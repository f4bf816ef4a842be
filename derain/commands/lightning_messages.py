"""Filters for Lightning's messages and warnings."""

import logging
import re
import warnings
from pathlib import Path

SHOWN_FILES = re.compile(r"lightning/pytorch/(callbacks|tuner|profilers)/|signal_connector\.py$")
"""Source files whose info messages are shown: callbacks, tuner, profilers and signal handling."""

SIGTERM_MESSAGE = re.compile("An SIGTERMException was raised")
"""Message that is hidden, since derain prints what stopped the run and how to resume it."""


class MessageFilter(logging.Filter):
    """Hide Lightning's info messages (seed, unused accelerators, tips), except those from `SHOWN_FILES`.

    `SIGTERM_MESSAGE` is hidden at every level.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show a message."""
        if not record.name.startswith("lightning"):  # the handler may be shared with other loggers
            return True
        if SIGTERM_MESSAGE.match(str(record.msg)):
            return False
        return record.levelno >= logging.WARNING or bool(SHOWN_FILES.search(Path(record.pathname).as_posix()))


def filter_lightning_messages() -> None:
    """Add `MessageFilter` to Lightning's loggers, and ignore warnings that do not apply to derain's runs."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(message_filter, MessageFilter) for message_filter in handler.filters):
                handler.addFilter(MessageFilter())
    for message in (
        ".*args parameter is intended to run from within Python.*",
        ".*treespec, LeafSpec.*",
        ".*The dirpath has changed.*",
        ".*exists and is not empty. Previous log files.*",  # run_setup restores metrics.csv of a resumed run
        "Checkpoint directory .* exists and is not empty.",  # true if a run is resumed in its folder
        ".*is smaller than the logging interval.*",
        "You are using a custom batch sampler .* for prediction.",  # derain's sampler returns every image once
        "It is recommended to use `self.log.*sync_dist=True.*",  # scores are gathered already; speeds are rank 0's
    ):
        warnings.filterwarnings("ignore", message)
    # PLNLIN-MCDDL: if an epoch ends before the first discriminator step, the discriminator's learning rate is scheduled
    # before its optimiser has stepped.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
