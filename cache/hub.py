"""Runs and caches in repositories of the Hugging Face Hub, `hf://USER/NAME` or `hf://USER/NAME@REVISION`: models and
data sets.

`hdovd.json` lists what was pushed: the SHA-256 of every file, and of the list. What is pulled lies in Hugging Face's
cache, by its rules (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT), and is checked once; what is not listed is not
used. Nothing that the client says is repeated, since it may hold a token.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from glob import escape
from pathlib import Path
from typing import Any

from hdovd.cache.identity import SEAL, hash_file, sealed
from hdovd.core import HdovdError, shorten, user_cache_folder

LIST = "hdovd.json"
FORMAT = 1  # of the list
KINDS = {"run": "model", "cache": "dataset"}  # of repositories, by what they hold


def is_hub(url: Path | str) -> bool:
    return str(url).startswith("hf:/")  # a Path has one slash


def repository(url: Path | str) -> tuple[str, str | None]:
    """USER/NAME and the revision. Raises HdovdError for anything else."""
    found = re.fullmatch(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@([\w.-][\w./-]*))?", str(url), re.ASCII)
    if found is None:
        raise HdovdError(f"{url}: expected hf://USER/NAME, or hf://USER/NAME@REVISION")
    return found[1], found[2]


def file_list(files: dict[str, Path]) -> bytes:
    """The list of files, by their names in the repository."""
    tree = {"format": FORMAT, "files": {name: hash_file(file) for name, file in sorted(files.items())}}
    return json.dumps(sealed(tree), indent=1).encode()


@contextmanager
def hub_client(url: Path | str) -> Iterator[Any]:
    """The package huggingface_hub. Raises HdovdError if it is not installed, and for what fails at the Hub."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise HdovdError(f'{url} needs the package huggingface_hub: pip install "hdovd[hub]"') from None
    reasons = {
        errors.GatedRepoError: "its owner has to let you in: ask on its page, and log in (hf auth login, or HF_TOKEN)",
        errors.RepositoryNotFoundError: "there is no such repository of this kind, or it is private: look at the name, "
        "and log in as somebody who may read it (hf auth login, or HF_TOKEN)",
        errors.RevisionNotFoundError: "it has no such revision: leave @REVISION out for the newest",
        errors.LocalEntryNotFoundError: "the Hub is not to be reached, or HF_HUB_OFFLINE is set, and Hugging Face's "
        "cache does not have all of it: pull it once where there is a network, with the same HF_HOME",
        errors.HFValidationError: "no name that the Hub takes",
        errors.EntryNotFoundError: f"it has no {LIST}: it was not made by hdovd push, or not by all of one",
    }
    try:
        yield huggingface_hub
    except Exception as error:
        if isinstance(error, HdovdError) or (isinstance(error, OSError) and error.errno):  # no room, no right
            raise
        status = getattr(getattr(error, "response", None), "status_code", 0)
        known = next((why for kind, why in reasons.items() if isinstance(error, kind)), None)
        why = {401: "log in (hf auth login, or HF_TOKEN)", 403: "your token may not do this: take one that may write"}
        told = known or why.get(status) or f"the Hub cannot be used ({type(error).__name__}): try it again later"
        raise HdovdError(f"{url}: {told}") from None  # the client's words can hold a token


@cache
def pulled(url: Path | str, kind: str) -> Path:
    """A folder of the user's own with what was pushed, of `kind` "run" or "cache": of large files links into Hugging
    Face's cache.

    Raises HdovdError if it cannot be had, or is not what was pushed.
    """
    url = re.sub("^hf:/+", "hf://", str(url))
    (repo, revision), options = repository(url), {"repo_type": KINDS[kind]}
    with hub_client(url) as client:
        get = partial(client.hf_hub_download, repo, **options)
        listed = Path(get(LIST, revision=revision))
        commit = listed.parent.name
        try:
            files = _listed(listed, url)
        except HdovdError:
            with suppress(ValueError):  # without a network
                get(LIST, revision=commit, force_download=True)
            files = _listed(listed, url)
        folder = user_cache_folder() / "hub" / f"{kind}s" / f"{repo.replace('/', '--')}@{commit}"
        if not all((folder / name).is_file() for name in files):
            tops = {escape(top) + "/*" * bool(rest) for top, _, rest in (name.partition("/") for name in files)}
            content = Path(client.snapshot_download(repo, revision=commit, allow_patterns=sorted(tops), **options))
            wrong = _wrong(content, files)
            for name in filter(wrong.get, wrong):
                logging.getLogger(__name__).info(f"{url}: {name} is not what was pushed, and is downloaded anew")
                with suppress(ValueError):
                    get(name, revision=commit, force_download=True)
            if wrong := _wrong(content, {name: files[name] for name in wrong}):
                told = [
                    f"{name} has SHA-256 {it or 'of no file'}, expected {files[name]}" for name, it in wrong.items()
                ]
                raise HdovdError(
                    f"{url} is not what was pushed, at {commit[:12]}: {shorten(told, 1)}. If there is a network to "
                    f"download it anew, it was changed since: push it again, or give @REVISION of an earlier one"
                )
            _lay(content, files, folder)
    return folder


def local_run(path: Path) -> Path:
    """The folder of a run, pulled if it is on the Hub."""
    return pulled(path, "run") if is_hub(path) else path


def _listed(file: Path, url: Path | str) -> dict[str, str]:
    """SHA-256 by name. Raises HdovdError for a list that is damaged, or of a newer version."""
    try:
        tree = json.loads(file.read_bytes())
        if tree["format"] > FORMAT:
            raise HdovdError(
                f"{url} was pushed by a newer hdovd (format {tree['format']}, not {FORMAT}): update this one"
            )
        files = {str(name): str(known) for name, known in tree["files"].items()}
        if (
            any({"", ".", ".."}.intersection(name.split("/")) or "\0" in name for name in files)  # out of the folder
            or not all(re.fullmatch("[0-9a-f]{64}", known) for known in files.values())
            or tree[SEAL] != sealed(tree)[SEAL]
        ):
            raise ValueError(SEAL)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise HdovdError(f"{url}: its {LIST} is damaged, or was changed since it was pushed: push it again") from None
    return files


def _wrong(content: Path, files: dict[str, str]) -> dict[str, str]:
    """SHA-256 of those that have another one, by name; empty of what is not there."""
    found = {name: hash_file(file) if (file := content / name).is_file() else "" for name in files}
    return {name: sha256 for name, sha256 in found.items() if sha256 != files[name]}


def _lay(content: Path, files: dict[str, str], folder: Path) -> None:
    """All files: links to tensors and to what lies in folders, and copies of the others, which commands may write anew.
    Several processes may do it at once.
    """
    for name in files:
        own = folder / name
        partial = own.with_name(f".partial-link-{os.getpid()}")
        own.parent.mkdir(parents=True, exist_ok=True)
        if "/" in name or name.endswith(".safetensors"):
            partial.symlink_to((content / name).resolve())
        else:
            shutil.copyfile(content / name, partial)
        os.replace(partial, own)
