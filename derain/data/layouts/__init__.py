"""Layouts of the public data sets: folders, file patterns, number of pairs, sources, protocols and known faults."""

from .drops import DROPS
from .general import GENERAL
from .patterns import AUXILIARY, PLACEHOLDERS, SPLIT_FOLDERS, Files, Layout, Side, Split
from .real import REAL
from .streaks import STREAKS
from .video import VIDEO
from .weather import WEATHER

__all__ = ["AUXILIARY", "LAYOUTS", "PLACEHOLDERS", "SPLIT_FOLDERS", "Files", "Layout", "Side", "Split"]

LAYOUTS: dict[str, Layout] = {**STREAKS, **REAL, **DROPS, **WEATHER, **VIDEO, **GENERAL}
"""Every data set by name, and the general layouts ``folder``, ``video`` and ``images``."""
