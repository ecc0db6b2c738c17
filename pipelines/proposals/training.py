"""Training a proposal network on base boxes alone; killed, it goes on from its checkpoint.

While it trains, a folder NAME.training beside the network's file NAME.safetensors holds the checkpoint.
"""

import shutil
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from hdovd.config.backbone import AUTO
from hdovd.core.log import log
from hdovd.data.coco import Split
from hdovd.modeling.proposals.base import ProposalNetwork
from hdovd.pipelines.common.device import Team, placed, training_workers
from hdovd.pipelines.common.precision import settled
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.dataloading.loader import TrainingBatches
from hdovd.pipelines.dataloading.sampler import Dealing, PlainShuffle, key_of
from hdovd.pipelines.proposals.config import NetworkConfig
from hdovd.pipelines.proposals.networks import (
    Picture,
    Pictures,
    build_network,
    check_made_by,
    load_network,
    made_by,
    provenance,
    require_some_readable,
    save_network,
    settings,
)
from hdovd.pipelines.runs.checkpoint import load_checkpoint
from hdovd.pipelines.training.hooks import SavingHooks
from hdovd.pipelines.training.loop import Loop
from hdovd.pipelines.training.train import data_parallel, prepared, told_shortly

STATE = ("model", "optimizer", "step", "window", "rng", "wanted")  # of a checkpoint


def trained_network(
    job: NetworkConfig, split: Split, us: Team, stop: StopSignal
) -> tuple[ProposalNetwork, dict[str, Any]]:
    """The network of a job, on the team's device, and what made it: from its file, or trained and put there.

    Raises HdovdError if the file, or the checkpoint of a training that was killed, was made otherwise; Stopped if a
    signal came.
    """
    job, line = settled_job(job, us)
    wanted = settings(job, split)
    if job.file.is_file() and not job.overwrite:
        check_made_by(made_by(job.file), wanted, job.file)
        log(f"network: {job.file}, trained with these settings before")
    else:
        if line:
            log(line)
        _train(job, split, wanted, us, stop)
    us.wait()
    network, origin = load_network(job.file, job.recipe)
    return placed(network, us.device).eval(), origin


def settled_job(job: NetworkConfig, us: Team) -> tuple[NetworkConfig, str]:
    """The job with a precision that is not auto, and the line to say of it: that of the network, or of its training,
    that is there.
    """
    own = None
    if job.recipe.train.precision == AUTO and not job.overwrite:
        state = None if job.file.is_file() else load_checkpoint(job.file.with_suffix(".training"), STATE)
        origin = made_by(job.file) if job.file.is_file() else None if state is None else state["wanted"]
        own = None if origin is None else str(origin["recipe"]["train"]["precision"])
    recipe, line = settled(job.recipe, us.device, own, "the network's")
    return replace(job, recipe=recipe), line


def _train(job: NetworkConfig, split: Split, wanted: dict[str, Any], us: Team, stop: StopSignal) -> None:
    config, folder = job.recipe.train, job.file.with_suffix(".training")
    state = None if job.overwrite else load_checkpoint(folder, STATE)
    us.wait()  # all have looked, before the first one writes
    if state is not None:
        check_made_by(state["wanted"], wanted, folder)
    require_some_readable(split)
    torch.manual_seed(config.seed)
    network = prepared(build_network(job.detector, job.recipe, initialise=state is None), job.recipe, us)
    model = network if us.world == 1 else data_parallel(network)

    def losses_of(samples: list[Picture], epoch: int) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model(
            [s.pixels.to(us.device, non_blocking=True) for s in samples],
            [s.boxes.to(us.device) for s in samples],
            [key_of(config.seed, epoch, s.image_id) for s in samples],
        )
        return losses

    dealing = Dealing(PlainShuffle(len(split.images), config.seed), config.batch_size, us.rank, us.world)
    batches = TrainingBatches(
        Pictures(split, job.recipe), dealing, training_workers(us.device, config.workers), device=us.device
    )
    loop = Loop(
        model, losses_of, batches, config, us.device, f"train {job.detector.value}", lambda sample: sample.image_id
    )
    if us.world > 1:  # each process draws for itself, where a backbone draws from torch's own generator
        torch.manual_seed(key_of(config.seed, -1, us.rank))
    hooks = SavingHooks(folder, network, us, stop, {"wanted": wanted}, job.save_minutes)
    if state is not None:
        hooks.restore(state, loop)
        log(f"training goes on at step {loop.step_number} of {loop.total}")
    with told_shortly():
        loop.run(hooks)
    if us.leads:
        trained = cast(ProposalNetwork, loop.result)
        save_network(job.file, trained, provenance(job, split, trained.state_dict()))
        shutil.rmtree(folder, ignore_errors=True)
        log(f"wrote {job.file}: the network, for --checkpoint")
