"""A checkpoint: all that a run needs to go on sample by sample, in one file that is whole or absent.

    model                    weights and queues
    optimizer, step, window  as of `training.loop.Loop`
    rng                      torch's generators, a process each
    layout                   of `train.batches_of`: what the order depends on
    log_bytes                length of log.jsonl
    best, ended, failed      of `training.hooks.RunHooks`
    ema                      with `train.ema`: of `training.loop.WeightAverage`; `model` has the weights that are
                             trained

Losses, samples and their order follow from seed and epoch; torch's generators matter only
to what else draws from them.
"""

import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hdovd.core.errors import HdovdError, require_readable
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.tensors import load_pth

FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint; a kill, a power cut or a full disk leaves the old one or the new one. Raises
    HdovdError."""
    replace_file(folder / FILE, lambda partial: torch.save(state, partial))


def load_checkpoint(folder: Path, needs: Collection[str] = ()) -> dict[str, Any] | None:
    """The checkpoint, or None if there is none. Raises HdovdError for one that cannot be read, is not what was written
    (by the checksums of its zip file, which torch does not look at), or lacks something of `needs`.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    require_readable(file)
    try:
        with zipfile.ZipFile(file) as records:
            if (damaged := records.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        state: dict[str, Any] = load_pth(file)
        if missing := set(needs) - state.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:
        raise HdovdError(
            f"{file} cannot be read ({error}): was it copied whole? Without it training can only begin anew: "
            "--overwrite, and no --resume"
        ) from error
    return state


@contextmanager
def fits(folder: Path) -> Iterator[None]:
    """Raises HdovdError if what is done with the checkpoint of a folder fails."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise HdovdError(
            f"{folder / FILE} does not fit this training ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}): is it that of another run?"
        ) from error


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of this process."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
