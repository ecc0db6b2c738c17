"""What an adapted run is trained on: pictures with boxes of new classes, and pictures of the run's earlier cache.

Nobody looked for the run's base classes in the new pictures, nor for the new ones in the earlier. So each picture is
judged by the classes of its own data alone (`hdovd.modeling.losses.classwise.of_judged`), and in the new ones the boxes
in which the run itself is sure of one of its classes count as boxes of it. How much of the run is trained on that, and
for how long, is decided by how much there is (`planned`). C classes, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core import HdovdError, log, shorten
from hdovd.data import ImageBoxes, Protocol, Split
from hdovd.data.targets import Targets
from hdovd.pipelines.calibration.values import VALUES
from hdovd.pipelines.common.settings import value_at
from hdovd.pipelines.dataloading.loader import Draw, key_of
from hdovd.pipelines.detection.names import Gap
from hdovd.pipelines.nouns.allowed import meaning
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.initial_weights import SAME_TEXT
from hdovd.pipelines.training.training_set import Sample, TrainingSet

SAME_OBJECT, HELD_OUT = 0.5, 10  # IoU; one image in so many is held out
FEW = 100  # of fewer images none is held out: they are too few to judge by, and to do without
CLEAR = 3  # boxes more that are named rightly: fewer can be chance
# What tells the CLIP and the prompts of a class level from others; the precision that it was computed in does not.
ORIGIN = ("clip.weights_sha256", "clip.architecture", "clip.activation", "clip.format", "templates")


def groups_between(before: Protocol, after: Protocol) -> dict[str, tuple[str, ...]]:
    """The classes of `after` by what became of them, without groups that are empty: those that have boxes now alone,
    those that had boxes before, and those that never had, known before or not.
    """
    found = {
        "new": [name for name in after.base if name not in before.base],
        "old base": [name for name in after.base if name in before.base],
        "old novel": [name for name in after.novel if name in before.names],
        "new novel": [name for name in after.novel if name not in before.names],
    }
    return {group: tuple(names) for group, names in found.items() if names}


def joined_protocol(run: Protocol, mine: Protocol) -> Protocol:
    """The classes of a run, whose base classes keep their labels, and those of new data. What is not new is told.
    Raises HdovdError for a class that both have, in another spelling.
    """
    known = {meaning(name): name for name in run.names}
    for name in mine.names:
        if name not in run.names and (other := known.get(meaning(name))) is not None:
            raise HdovdError(
                f"class {name!r} of protocol {mine.name} is {other!r} of the run in another spelling: call it "
                f"{other!r} in the protocol and in the annotations"
            )
    again, seen = (shorten([name for name in mine.base if name in own]) or "none" for own in (run.base, run.novel))
    log(f"classes that the run had boxes of, trained further: {again}; novel before, and base now: {seen}")
    base = tuple(dict.fromkeys((*run.base, *mine.base)))
    novel = tuple(dict.fromkeys(name for name in (*run.novel, *mine.novel) if name not in base))
    after = replace(run, name=f"{run.name}+{mine.name}"[:80], base=base, novel=novel)
    return replace(after, groups=groups_between(run, after))


def class_rows(run: RunFolder, cache: FeatureCache, names: Sequence[str]) -> dict[str, np.ndarray]:
    """(D,) text embedding of each class, the run's where it has one, and else the cache's. Raises HdovdError if the two
    are of another CLIP, or of other prompts, or a class is in neither.
    """
    own = dict(zip(run.protocol().names, run.class_embeddings().float().numpy(), strict=True))
    there = dict(zip(cache.names(Level.CLASS), cache.embeddings(Level.CLASS), strict=True))
    dim, inputs = len(next(iter(own.values()))), value_at(run.record(), "cache.levels.class.inputs")
    wrong = [f"embeddings have {cache.dim} values, expected {dim}"] if cache.dim != dim else []
    same = own.keys() - set(value_at(run.record(), "adapted.examples") or [])  # the others are not of names alone
    cosines = {} if wrong else {name: float(row @ own[name]) for name, row in there.items() if name in same}
    wrong += [f"that of {name!r} is another one, cosine {at:.3f}" for name, at in cosines.items() if at < SAME_TEXT]
    wrong += [
        f"{k} differs" for k in ORIGIN if inputs and value_at(cache.key_inputs(Level.CLASS), k) != value_at(inputs, k)
    ]
    if wrong:
        raise HdovdError(
            f"the text embeddings of {cache.url} are of another CLIP or other prompts than those of {run.path}: "
            f"{shorten(wrong, 2)}; extract --data with the --clip, --pretrained and --templates of the run's cache"
        )
    if not (inputs or cosines):
        log(f"note: nothing tells whether {cache.url} is of the CLIP of {run.path}: no class is in both")
    new = [name for name in names if name not in own]
    return own | dict(zip(new, cache.class_embeddings(new), strict=True))


class JudgedSet(TrainingSet):
    """A training set by the labels of a joined protocol. `judging` are the images to judge by: a tenth, held out of
    training, or, if there are `few` images, all that have boxes. After its own images an epoch has `drawn` of `replay`,
    if there is one: others by seed and epoch, and called -1 - id.

    `place`: the joined label of each of its own base classes. `taught`: by image, boxes of which the run is sure,
    (t, 5): x0, y0, x1, y1, label. `rows`: by name, the text embeddings of the joined classes.
    """

    def __init__(
        self,
        split: Split,
        cache: FeatureCache,
        recipe: Recipe,
        own: Protocol,
        rows: dict[str, np.ndarray],
        base: Sequence[str],
        replay: "JudgedSet | None" = None,
    ) -> None:
        """`base`: the joined base classes. Raises HdovdError as TrainingSet, and for images without any box."""
        super().__init__(split, cache, recipe)
        self.place, self.rows, self.base = torch.tensor([base.index(name) for name in own.base]), rows, base
        self.taught, self.replay, self.drawn = dict[int, Tensor](), replay, 0
        once = {image.id: image for image in self.images if len(image.labels)}  # by the others no class is judged
        told = sorted(once.values(), key=lambda image: key_of(recipe.train.seed, -3, image.id))
        if not told:
            raise HdovdError(f"{split.annotations}: no image with boxes of its base classes, expected one at least")
        self.few = len(told) < FEW
        self.judging = told if self.few else told[: len(told) // HELD_OUT]
        held = set() if self.few else {image.id for image in self.judging}
        self.images = [image for image in self.images if image.id not in held]

    def targets(self, image: ImageBoxes) -> Targets:
        """By the joined protocol, with the boxes of which the run is sure."""
        targets, judged = super().targets(image), torch.zeros(len(self.base), dtype=torch.bool)
        judged[self.place if targets.judged is None else self.place[targets.judged]] = True
        targets = replace(targets, labels=self.place[targets.labels], judged=judged)
        return with_taught(targets, self.taught[image.id]) if image.id in self.taught else targets

    def __len__(self) -> int:
        return len(self.images) + self.drawn

    def __getitem__(self, draw: Draw) -> Sample:
        if self.replay is None or draw.index < len(self.images):
            return super().__getitem__(draw)
        index = key_of(self.recipe.train.seed, draw.epoch, -1 - draw.index) % len(self.replay)
        pixels, targets, image_id = self.replay[replace(draw, index=index)]
        return pixels, targets, -1 - image_id

    def image_ids(self) -> np.ndarray:
        """(n,) int64, by index; those of `replay`, which differ from epoch to epoch, are -1."""
        return np.concatenate([super().image_ids(), np.full(self.drawn, -1, np.int64)])

    def class_embeddings(self, names: Sequence[str]) -> np.ndarray:
        return np.stack([self.rows[name] for name in names])


def mix_examples(data: JudgedSet, names: Sequence[str], gap: Gap) -> dict[str, np.ndarray]:
    """(D,) embedding of those of the classes `names` whose own names say nothing: of the boxes that the data have of
    one, fewer than half are nearer to its name than to those of all other classes. It is that of its boxes, moved among
    the texts, or the mean with its name's: whichever names most boxes rightly, CLEAR more at least, each of its boxes
    by the others alone. It is told.
    """
    if not names:
        return {}
    found = [(t.labels, t.embeddings) for t in map(data.targets, {image.id: image for image in data.images}.values())]
    label, rows = torch.cat([one for one, _ in found]), torch.cat([two for _, two in found])
    label, rows = label[rows.any(dim=1)], F.normalize(rows[rows.any(dim=1)], dim=1)  # zeros: not in the cache
    texts, mixed, told = torch.from_numpy(data.class_embeddings(data.base)), dict[str, np.ndarray](), list[str]()
    best, nearest = (rows @ texts.T).topk(2, dim=1)
    right = nearest[:, 0] == label
    for name in names:
        k = data.base.index(name)
        own, other = label == k, torch.where(nearest[:, 0] == k, best[:, 1], best[:, 0])
        if not own.any() or 2 * int(right[own].sum()) >= int(own.sum()):
            continue
        total, reached = rows[own].sum(dim=0), int(right.sum()) + CLEAR - 1
        shown = gap.moved(F.normalize(torch.cat([total[None], total - rows[own]]), dim=1))
        for mix in (0.5, 1.0):
            row, *each = F.normalize(mix * shown + (1 - mix) * texts[k], dim=1)
            score = rows @ row
            score[own] = (rows[own] * torch.stack(each)).sum(dim=1)
            now = torch.where(own, score > other, right & (score < best[:, 0]))
            if int(now.sum()) > reached:
                reached, mixed[name] = int(now.sum()), row.numpy()
        told += [f"{name} ({int(right[own].sum())} of {int(own.sum())})"] if name in mixed else []
    if told:
        log(f"new classes whose names CLIP finds in fewer than half of their boxes, embedded by these: {shorten(told)}")
    return mixed


def with_taught(targets: Targets, taught: Tensor) -> Targets:
    """The targets with boxes (t, 5) among the base boxes. Each has the row of the pseudo box that it overlaps most;
    those that lie on it are pseudo boxes no more. Without pseudo boxes, rows are zeros, which no level asks for.
    """
    nothing = torch.zeros(1, targets.embeddings.shape[1])
    overlap = box_iou(taught[:, :4], torch.cat([targets.pseudo_boxes, torch.zeros(1, 4)]))
    rows, rest = torch.cat([targets.pseudo_embeddings, nothing]), (overlap[:, :-1] < SAME_OBJECT).all(dim=0)
    return replace(
        targets,
        boxes=torch.cat([targets.boxes, taught[:, :4]]),
        labels=torch.cat([targets.labels, taught[:, 4].long()]),
        embeddings=torch.cat([targets.embeddings, rows[overlap.argmax(dim=1)]]),
        pseudo_boxes=targets.pseudo_boxes[rest],
        pseudo_embeddings=targets.pseudo_embeddings[rest],
        pseudo_texts=targets.pseudo_texts[rest],
    )


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
    backbone, done = old.detector.backbone, int(entries[-1]["step"]) if entries else None  # an import has no log
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
        f"{pictures:,d} new pictures and {0 if data.few else len(data.judging):,d} held out, {data.drawn:,d} earlier "
        "ones an epoch: "
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
    naive = [*NAIVE, *(NAIVE_TEXT if hasattr(recipe.detector, "text") else ())]
    return load_recipe(file, [*naive, *parts, f"train.warmup_iterations={warm_up}"])
