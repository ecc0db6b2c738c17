"""What every room needs: the errors that users see, and the readers of the text files that they bring; here the
version, for the package, its files and its pages, and the user's own folder.
"""

import os
from pathlib import Path

__version__ = "0.2.0"


def user_cache_folder() -> Path:
    """What is kept between commands: $XDG_CACHE_HOME/hdovd, or ~/.cache/hdovd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hdovd"
