"""Training: stream pictures and cached rows into the detector, from a Zarr cache or tar shards. CLIP is not imported in
this process.

Under torchrun every one of its processes runs `train`. With `train.compile`, torch compiles the backbone and its
pyramid for the machine.
"""

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from shlex import quote
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hdovd.cache import Catalog, Level, RunRecord, is_tar_form
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, in_a_line, log, quiet
from hdovd.data import METRICS, DataPaths, Protocol, load_protocol
from hdovd.modeling.backbones.pyramid import with_synced_norms
from hdovd.modeling.base import Detector, build_detector
from hdovd.modeling.distributed import world_size
from hdovd.modeling.proposals.networks import ProposalNetwork
from hdovd.pipelines.calibration.values import with_reliability
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.device import Team, placed, provenance, settled, team, training_workers
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.dataloading.loader import Dealing, Streams, TrainingBatches, key_of
from hdovd.pipelines.evaluation.evaluate import Validation
from hdovd.pipelines.extraction.config import LabelRule
from hdovd.pipelines.extraction.identities import give_object_text, object_text_of
from hdovd.pipelines.runs import UPPER_BOUND, RunFolder, tracking
from hdovd.pipelines.training.config import TrainConfig
from hdovd.pipelines.training.hooks import RunHooks, fits, load_checkpoint
from hdovd.pipelines.training.initial_weights import begin_with, require_same_init
from hdovd.pipelines.training.loop import Loop, UnsoundLoss
from hdovd.pipelines.training.training_set import Sample, TarTrainingSet, TrainingSet


def compile_backbone(backbone: nn.Module, device: torch.device, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a network in place at its first batch, for batches of all sizes; names in its state stay as they are.

    It is one graph without gaps: what torch cannot compile is an error in the first step (`told_shortly`), and never
    quietly left as it is. SyncBatchNorm is the exception, which talks to other processes: what lies between two of them
    is compiled. The rest of a detector (proposals, RoIs, matching) has as many rows as it finds, which differ from step
    to step, and is not compiled.

    Raises HdovdError if there is no compiler for the device.
    """
    number = float(time.time_ns())  # in the code: what was compiled before does not serve
    try:
        torch.compile(lambda rows: rows * number, backend=backend)(torch.ones(8, device=device))
    except Exception as error:
        need = "Triton (pip install triton)" if device.type == "cuda" else "a C++ compiler (apt-get install g++)"
        raise HdovdError(
            f"train.compile = true: torch cannot compile for {device.type} here ({in_a_line(error)}); it needs "
            f"{need}. Without it, train with train.compile=false"
        ) from error
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules())
    backbone.compile(backend=backend, dynamic=True, fullgraph=not synced)


@contextmanager
def told_shortly() -> Iterator[None]:
    """An error of torch's compiler within is told in a line, as HdovdError."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise HdovdError(
            f"train.compile = true: torch cannot compile the backbone ({in_a_line(error)}); train with "
            f"train.compile=false"
        ) from error


STATE = ("model", "optimizer", "step", "window", "layout", "log_bytes", "best", "ended")  # of a checkpoint


def train(job: TrainConfig) -> RunFolder:
    """Train one detector and return its folder.

    Raises HdovdError for bad input or a loss that is not sound, and Stopped if a signal ended it: it is saved, and can
    be resumed.
    """
    job.check()
    with team(job.device) as us, StopSignal(interrupts=True) as stop, quiet(not us.leads):
        return train_on(job, us, stop, load_protocol(job.protocol))


def train_on(
    job: TrainConfig,
    us: Team,
    stop: StopSignal,
    protocol: Protocol,
    given: TrainingSet | None = None,
    about: dict[str, Any] | None = None,
) -> RunFolder:
    """`train` as one of a team. `given`: what to train on, by default that of the job; `about`: more for the run's
    record.
    """
    run = RunFolder(job.out)
    began = run.written_recipe().train.precision if job.resume and (job.out / "config.toml").is_file() else None
    recipe, line = settled(job.recipe, us.device, began, "the run's")
    if line:
        log(line)
    data = training_data(job, protocol) if given is None else given
    written, recipe, reliability = with_reliability(recipe, data.label_origin, job.calibration, protocol.base)
    job = replace(job, recipe=written)
    begun: dict[str, Any] = {"precision": recipe.train.precision, **({"oracle": True} if job.oracle else {})} | (
        about or {}
    )
    state = _state(run, job, protocol, data.record() | begun)
    class_embeddings = torch.from_numpy(data.class_embeddings(protocol.names))
    batches, layout = batches_of(data, us, None if state is None else state["layout"])
    torch.manual_seed(recipe.train.seed)
    model = prepared(build_detector(recipe, data.dim, initialise=state is None and job.init is None), recipe, us)
    if state is None:
        if job.init is not None:
            begun["init"] = begin_with(model, job.init, protocol, class_embeddings)
        begun |= give_object_text(model, object_text_of(data.features, data.dim, str(job.cache)), str(job.cache))
    _give_backgrounds(model, data, recipe)
    if recipe.loss.class_.federated and not protocol.federated:
        log(
            f"note: loss.class.federated changes nothing: with protocol {protocol.name} annotations say of no image "
            f"what it is judged by"
        )
    seen = protocol.names if job.oracle else protocol.base
    loop = loop_of(model, batches, class_embeddings[: len(seen)].to(us.device), recipe, us.device)
    hooks = RunHooks(
        run,
        model,
        us,
        stop,
        {"layout": layout},
        job.save_minutes,
        "the same command with --resume",
        validate=_validation(job, protocol, class_embeddings, us),
        val_every=job.val_every,
        metric=METRICS[protocol.metric],
    )
    if state is not None:
        hooks.restore(state, loop)
        if hooks.ended == recipe.train.epochs:
            log(f"{run.path} is finished already")
            return run
    _begin(run, job, data, protocol, class_embeddings, us, state, reliability | begun)
    kind, loss = "classes, base and novel" if job.oracle else "base classes", recipe.loss
    switches = {"instance": loss.instance.enabled, "class": loss.class_.enabled, "image": loss.image.enabled}
    levels = ", ".join(level for level, on in switches.items() if on) or "none (base-only)"
    log(
        f"{len(data)} images, boxes of {len(seen)} {kind}; distillation levels: {levels}; {us.device}"
        + (f", {us.world} processes" if us.world > 1 else "")
        + (f"; goes on at step {loop.step_number} of {loop.total}" if state else "")
    )
    _run(loop, hooks, run, job, us)
    failed = f"; validations that failed, as said above: {hooks.failed}" if hooks.failed else ""
    log(f"wrote {run.path}{failed}" + ("" if given is not None else f"; next: hdovd eval {quote(str(run.path))} ..."))
    return run


def _state(run: RunFolder, job: TrainConfig, protocol: Protocol, record: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint that a run goes on from; None where it begins. Raises HdovdError if it began otherwise than the
    job, the protocol and `record` say.
    """
    state = load_checkpoint(job.out, STATE) if job.resume else None
    if state is not None:
        run.check_same(job.recipe, protocol, record)
        require_same_init(job.init, run)
        with fits(job.out):
            _ = int(state["log_bytes"]), *(state["layout"][name] for name in ("streams", "unit", "images"))
    return state


def _run(loop: Loop[Sample], hooks: RunHooks, run: RunFolder, job: TrainConfig, us: Team) -> None:
    """Train to the end, sending to the job's trackers. Raises HdovdError for a loss that is not sound, its batch
    kept.
    """
    try:
        with tracking(run, job.track if us.leads else ()) as tracked, told_shortly():
            hooks.follow = tracked.follow
            hooks.catch_up(loop)
            loop.run(hooks)
    except UnsoundLoss as error:
        file = run.path / (f"unsound_batch-{us.rank}.json" if us.world > 1 else "unsound_batch.json")
        write_text(file, json.dumps(error.record, indent=1))
        raise HdovdError(f"{error}; the batch is in {file}") from error


def _give_backgrounds(model: Detector, data: TrainingSet | TarTrainingSet, recipe: Recipe) -> None:
    """The texts of backgrounds, where the recipe asks for them and the detector can use them."""
    if recipe.loss.class_.enabled and recipe.loss.class_.backgrounds and model.knows_backgrounds:
        labels = data.label_origin().inputs.get(Level.PSEUDO_LABEL, {})
        rows = data.nouns[list(LabelRule.of(labels).backgrounds)]
        if len(rows):
            model.set_background_texts(rows.to(next(model.parameters()).device))
        log(f"texts of {len(rows)} nouns that are backgrounds are negatives, beside the learned one")


Network = TypeVar("Network", Detector, ProposalNetwork)


def prepared(model: Network, recipe: Recipe, us: Team) -> Network:
    """The network on its device, compiled if the recipe says so. In several processes on GPUs, batch norms take the
    statistics of the whole batch.
    """
    if us.world > 1 and recipe.detector.backbone.norm == "batch" and us.device.type == "cuda":
        model.backbone = with_synced_norms(model.backbone)
    model = placed(model, us.device)
    if recipe.train.compile:
        compile_backbone(model.backbone, us.device)
    return model


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """Buffers are not sent at every step: the memories are the same in all processes, and no step needs those of batch
    norms.
    """
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # and the old name warns
    return DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        **{"forward_sync_buffers" if newer else "broadcast_buffers": False},  # type: ignore[arg-type]
        find_unused_parameters=getattr(model, "has_idle_parameters", False),
    )


def training_data(job: TrainConfig, protocol: Protocol) -> TrainingSet | TarTrainingSet:
    """Tar shards alone, or a Zarr cache with the data set that it was made of; of an oracle with boxes of all
    classes.
    """
    if is_tar_form(job.cache):
        if job.data != DataPaths():
            log(
                "note: the shards hold pictures and boxes; --data, --images and --annotations are not read for training"
            )
        return TarTrainingSet(str(job.cache), protocol, job.recipe, features=job.features)
    if job.oracle:
        log(f"oracle: boxes of the {len(protocol.novel)} novel classes are trained on; its AP is {UPPER_BOUND}")
        protocol = protocol.all_base()
    split = job.data.load("train2017", protocol, base_only=True, exif=job.recipe.input.exif)
    return TrainingSet(split, FeatureCache(job.cache, job.features, checked=job.checksums), job.recipe)


def batches_of(
    data: TrainingSet | TarTrainingSet, us: Team, layout: dict[str, Any] | None = None
) -> tuple[TrainingBatches[Sample], dict[str, Any]]:
    """This process's batches, and what their order depends on: who reads side by side, and a hash of the first epoch.

    `layout`: that of a run that is resumed, which keeps its order. Raises HdovdError if the data come in another one.
    """
    config = data.recipe.train
    workers = training_workers(us.device, config.workers)
    streams = (
        Streams(max(1, workers) * us.world, max(1, min(config.batch_size, len(data)) // us.world))
        if layout is None
        else Streams(layout["streams"], layout["unit"])
    )
    order = data.order(streams)
    found = {
        "streams": streams.count,
        "unit": streams.unit,
        "images": len(data),
        "order": sha256(data.image_ids()[order(0)].tobytes()).hexdigest()[:16],
    }
    if layout is not None and found != layout:
        raise HdovdError(
            f"the run began with {layout['images']} images, now there are {len(data)}: give the same --data and "
            f"--annotations"
            if layout["images"] != len(data)
            else "the images come in another order than the run began with: go on with the "
            "same form and place of the cache (Zarr or tar shards, the same shards, on disk or in an object store)"
        )
    dealing = Dealing(order, config.batch_size, us.rank, us.world, config.accumulate)
    if isinstance(data, TarTrainingSet):
        data.dealing = dealing
    return TrainingBatches(data, dealing, workers, device=us.device), found


def loop_of(
    detector: Detector, batches: TrainingBatches[Sample], texts: Tensor, recipe: Recipe, device: torch.device
) -> Loop[Sample]:
    """The loop that trains a detector on batches, with the text embeddings (Kb, D) of the base classes on its
    device."""
    model: nn.Module = detector if world_size() == 1 else data_parallel(detector)

    def losses_of(samples: list[Sample], epoch: int) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model(
            [picture.to(device, non_blocking=True) for picture, _, _ in samples],
            [targets.to(device) for _, targets, _ in samples],
            texts,
            [key_of(recipe.train.seed, epoch, image_id) for _, _, image_id in samples],
        )
        return losses

    return Loop(
        model, losses_of, batches, recipe.train, device, "train", lambda sample: sample[2], detector.begin_epoch
    )


def _begin(
    run: RunFolder,
    job: TrainConfig,
    data: TrainingSet | TarTrainingSet,
    protocol: Protocol,
    class_embeddings: Tensor,
    us: Team,
    state: dict[str, Any] | None,
    origin: dict[str, Any],
) -> None:
    """The run folder is made, or made ready to go on, by the process that leads; the others wait for it."""
    if us.leads:
        now = provenance(us.device, us.world)
        if state is None:
            if job.resume and (job.out / "model.safetensors").exists() and not job.overwrite:
                raise HdovdError(
                    f"{job.out} holds a run without a checkpoint.pt: it cannot be resumed. Give another --out, or "
                    f"--overwrite"
                )
            if not (job.resume or job.overwrite):
                RunFolder.require_none(job.out)  # another process may have begun one since it was asked first
            RunFolder.create(job.out, job.recipe, protocol, class_embeddings, {**data.record(), **origin, **now})
        else:
            run.go_on(int(state["log_bytes"]), {**now, "step": int(state["step"])})
        if isinstance(data, TrainingSet):
            tell_cache(data.cache, run)
    us.wait()


def _validation(
    job: TrainConfig, protocol: Protocol, texts: Tensor, us: Team
) -> Callable[[nn.Module], dict[str, float | None]] | None:
    """What gives the AP of each group of a detector, by the protocol's metric, in the one process that validates; None
    without validation.
    """
    if job.validation is None and job.val_every:
        log("no validation while training: no pictures for it under --data, and no --val-images and --val-annotations")
    if job.validation is None or not job.val_every or not us.leads:
        return None
    config = job.recipe.train
    validation = Validation(
        job.validation,
        protocol,
        us.device,
        exif=job.recipe.input.exif,
        batch_size=max(1, config.batch_size // (us.world * config.accumulate)),
    )
    return lambda model: validation.run(cast(Detector, model), texts).combined.summary()[protocol.metric]


def tell_cache(cache: FeatureCache, run: RunFolder) -> None:
    """Record in a cache that a run uses it, so that `hdovd cache gc` keeps what it needs."""
    try:
        Catalog(cache.url).record_run(RunRecord(str(run.path.resolve()), cache.set.levels))
    except HdovdError as error:
        log(f"note: {error}; hdovd cache gc will not know of this run")
