"""How much of a run is trained on new data, and for how long: decided by how much there is."""

from collections.abc import Sequence
from math import gcd
from pathlib import Path

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core.log import log
from hdovd.pipelines.adaptation.data import HELD_OUT, JudgedSet
from hdovd.pipelines.calibration.values import VALUES
from hdovd.pipelines.common.settings import value_at
from hdovd.pipelines.runs.folder import RunFolder

SHORTER = 4  # so many times less training than the run would need anew, with the new pictures among its own
FROZEN = 0.8  # of the time of a step is that of one in which the backbone stays as it is
ALL_STAGES = 5  # of a backbone
SHORT = 200  # steps; in fewer the backbone stays as it is, and with few pictures
SLOWER = 4  # so many times smaller a learning rate than the run's, with few pictures, or without earlier ones
MOST_EPOCHS, LEAST_SHARE = 20, 0.25  # how often a new picture is seen at most; share of earlier ones at least
LONGEST = 4000  # steps that a run is taken to have had where it does not say
NAIVE = (  # to compare with: boxes alone, and what has none is background
    "loss.class.federated=false",
    "loss.instance.alignment_weight=0.0",
    "loss.instance.relation_weight=0.0",
    "loss.image.weight=0.0",
    "loss.extra={}",
    "pseudo_boxes.min_side=1e9",
)
NAIVE_TEXT = ("detector.text.alignment_weight=0.0", "detector.text.relation_weight=0.0")  # of detectors of queries


def chain_of(run: RunFolder, tried: tuple[Path, ...] = ()) -> list[RunFolder]:
    """A run, the one whose weights it began with, that of this one, and so on, as far as they are here."""
    start = value_at(run.record(), "init.run")
    before = Path(str(start))
    more = start is not None and before not in tried and (before / "run.json").is_file()
    return [run, *(chain_of(RunFolder(before), (*tried, before)) if more else [])]


def adapted_from(run: RunFolder) -> list[RunFolder]:
    """Of the chain of a run the adaptations, the last first, and the run that they began with, if it is here."""
    chain = chain_of(run)
    return chain[: next((n for n, one in enumerate(chain, start=1) if "adapted" not in one.record()), len(chain))]


def parted(batch: int, accumulate: int, world: int) -> tuple[int, list[str]]:
    """The largest batch up to `batch` that processes share evenly, one picture each at least, and its settings."""
    batch = max(world, batch // world * world)
    return batch, [f"train.batch_size={batch}", f"train.accumulate={gcd(batch // world, accumulate)}"]


def planned(
    run: RunFolder, data: JudgedSet, settings: Sequence[str], share: float | None = None, world: int = 1
) -> Recipe:
    """The recipe of a run with how much of it is trained on data and for how long, and `settings` over that; told in a
    line. How many earlier pictures an epoch of `data` has becomes what `share` says, or what fills the time that there
    is where no new picture is seen more than MOST_EPOCHS times. `world`: processes.
    """
    first, file, pictures = adapted_from(run)[-1], str(run.path / "config.toml"), len(data.images)
    old, entries, weights = first.written_recipe(), first.entries(), run.record().get("reliability", {})
    if "adapted" in first.record():
        log(f"note: the run that {first.path} began with is not here: how much is trained follows {first.path} itself")
    backbone, done = old.detector.backbone, int(entries[-1]["step"]) if entries else None  # an import has no log
    held = 0 if data.few else len(data.judging)
    seen = (done or LONGEST) * old.train.batch_size / SHORTER  # pictures
    known = (value_at(first.record(), "cache.levels.boxes.inputs.images.count") or 0) * (1 - 1 / HELD_OUT)
    if earlier := max(known, 0 if data.replay is None else len(data.replay.images)):
        seen *= 1 + pictures / earlier
    # The stages of other libraries' backbones are not always known, and so not frozen.
    at_rest = (data.few or seen < SHORT * old.train.batch_size) and ":" not in backbone.name
    stages = f"detector.backbone.frozen_stages={ALL_STAGES if at_rest else backbone.frozen_stages}"
    if load_recipe(file, [stages, *settings]).detector.backbone.frozen_stages == ALL_STAGES > backbone.frozen_stages:
        seen /= FROZEN
    least = 0.0 if data.replay is None else share or LEAST_SHARE
    epochs = min(MOST_EPOCHS, max(1, round(seen * (1 - least) / pictures)))
    if data.replay is not None:
        fewest = max(1, round(pictures * least / (1 - least)))
        data.drawn = fewest if share else max(fewest, round(seen / epochs) - pictures)
    an_epoch = len(data)
    _, parts = parted(min(old.train.batch_size, 1 << (an_epoch.bit_length() - 1)), old.train.accumulate, world)
    auto = "auto" in (getattr(old.pseudo_boxes, f"reliability_{name}") for name in VALUES)
    plan = [
        *parts,
        f"train.epochs={epochs}",
        "train.schedule=cosine",
        "pseudo_boxes.from_epoch=1",
        "loss.class.federated=true",
        stages,
        *(f"pseudo_boxes.reliability_{name}={weights[name]!r}" for name in VALUES if auto and name in weights),
    ]
    asked = load_recipe(file, [*plan, *settings]).train
    warm_up = min(old.train.warmup_iterations, asked.epochs * max(1, an_epoch // asked.batch_size) // 10)
    lr = old.train.lr * asked.batch_size / old.train.batch_size / (SLOWER if data.few or data.replay is None else 1)
    recipe = load_recipe(file, [*plan, f"train.lr={lr!r}", f"train.warmup_iterations={warm_up}", *settings])
    had = "an unknown number of" if done is None else f"{done:,d}"
    log(
        f"{pictures:,d} new pictures and {held:,d} held out, {data.drawn:,d} earlier ones an epoch: "
        f"train.epochs={recipe.train.epochs} (the run had {had} steps), "
        f"train.batch_size={recipe.train.batch_size}, train.lr={recipe.train.lr:.2g}, "
        f"detector.backbone.frozen_stages={recipe.detector.backbone.frozen_stages}; --set says otherwise"
    )
    return recipe


def plain(run: RunFolder, pictures: int, world: int = 1) -> Recipe:
    """The recipe of an adapted run as that of plain fine-tuning on its new pictures alone."""
    file, recipe = str(run.path / "config.toml"), run.written_recipe()
    batch, parts = parted(min(recipe.train.batch_size, pictures), recipe.train.accumulate, world)
    warm_up = min(recipe.train.warmup_iterations, recipe.train.epochs * max(1, pictures // batch) // 10)
    of_text = NAIVE_TEXT if hasattr(recipe.detector, "text") else ()
    return load_recipe(file, [*NAIVE, *of_text, *parts, f"train.warmup_iterations={warm_up}"])
