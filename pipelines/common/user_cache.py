"""The folder of things that are made once for a user and not for a project."""

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """$XDG_CACHE_HOME/hdovd, or ~/.cache/hdovd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hdovd"
