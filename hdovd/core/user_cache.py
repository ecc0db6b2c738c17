"""The user's own folder for what is kept between commands."""

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """$XDG_CACHE_HOME/hdovd, or ~/.cache/hdovd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hdovd"
