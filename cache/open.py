"""A cache's folder by its path or URL."""

from pathlib import Path
from urllib.parse import unquote

from hdovd.cache.local import LocalFolder
from hdovd.cache.store import Folder
from hdovd.core.errors import HdovdError


def open_folder(url: str | Path) -> Folder:
    """A local path, or file://, s3://, gs:// and whatever else fsspec knows. Raises HdovdError for a file:// URL of
    another machine.
    """
    text = str(url)
    if "://" not in text:
        return LocalFolder(Path(text))
    if text.startswith("file://"):
        host, slash, path = text.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            raise HdovdError(f"{text}: expected file:///PATH with three slashes, or the path alone")
        return LocalFolder(Path(unquote(slash + path)))
    from hdovd.cache.remote import RemoteFolder

    return RemoteFolder(text)
