"""Where derain keeps what can be made again."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """``$DERAIN_CACHE``, else the system's cache folder."""
    return Path(os.environ.get("DERAIN_CACHE") or platformdirs.user_cache_dir("derain", appauthor=False))
