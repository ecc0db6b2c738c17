"""Classes by example: pictures of what to look for, in place of a name or beside it, become rows of the classifier.

CLIP's image embeddings and its text embeddings lie in two cones, and detectors are taught with texts. So a row that is
made of pictures is moved from one cone to the other, by what the run's cache knows of its base classes (`Gap`):

    v = normalise(mean of the normalised embeddings of a class's crops)
    row = normalise(text + spread * normalise(v - image))

The pictures are embedded as the boxes of the cache were. A crop is told to CLIP alone. A picture with its boxes also
shows what the detector makes of an example, and what lies around it: `fit_rows` fits the rows to that. K classes with
examples, O other classes, n crops or regions, D embedding size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from hdovd.cache.reader import FeatureCache, normalised_rows
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.core.log import log
from hdovd.core.text_files import checked_name
from hdovd.data.coco import Exif, ImageBoxes, load_split, read_instances
from hdovd.data.protocol import Protocol
from hdovd.modeling.base import Detector
from hdovd.modeling.export.detectors import ExportableDetector, traceable
from hdovd.pipelines.common.device import inference_autocast
from hdovd.pipelines.common.images import AnyPicture, decode, find_pictures
from hdovd.pipelines.embedding.embedders import NO_FILE, Picture, Pictures, embedders_of, read_picture
from hdovd.pipelines.extraction.source import extraction_of
from hdovd.pipelines.teachers.base import Teacher
from hdovd.pipelines.teachers.prompts import folded

Shown = Path | str | Mapping[str, Sequence[AnyPicture]]  # a folder, a COCO file, or pictures by name
SAMPLED_IMAGES = 4_000  # of a cache: a mean needs no more
BATCH = 64  # crops


@dataclass(frozen=True, slots=True)
class Examples:
    """Crops of K classes: boxes of `images`, whose labels are places in `names`, and which `picture` reads from `path`.
    `skipped`: why pictures could not be read. `in_pictures`: whether the images show what is around.
    """

    names: tuple[str, ...]
    images: Sequence[ImageBoxes]
    path: Callable[[ImageBoxes], Path]
    picture: Callable[..., Picture] = read_picture
    skipped: Sequence[str] = ()
    in_pictures: bool = False


def read_examples(source: Shown, images: Path | None = None) -> Examples:
    """Examples of classes; crops are not read yet.

    Args:
        source: a folder with a subfolder of crops a class, the name of which is the class; a COCO instances file, every
            box of which is an example; or pictures by name, in any form that `decode` takes.
        images: the image folder of a COCO file.

    Raises HdovdError if there are none, a name comes twice, or a file is not there.
    """
    if isinstance(source, Mapping):
        return _of_pictures(source)
    source = Path(source)
    if source.is_dir():
        folders = sorted(one for one in source.iterdir() if one.is_dir() and not one.name.startswith("."))
        if not folders:
            raise HdovdError(f"--examples {source} has no subfolders: expected one a class, with its name, of crops")
        found = {one.name: find_pictures([str(one)], None, source / ".none") for one in folders if any(one.iterdir())}
        if empty := [one.name for one in folders if one.name not in found]:
            raise HdovdError(f"--examples {source}: no crops of {shorten(empty)}: its folder is empty")
        return _of_pictures({name: [picture.path for picture in pictures] for name, pictures in found.items()})
    if images is None or not images.is_dir():
        raise HdovdError(f"--examples {source}: no folder of its pictures: give it with --example-images")
    return _of_annotations(source, images)


def _of_pictures(pictures: Mapping[str, Sequence[AnyPicture]]) -> Examples:
    """Every picture is a crop as a whole. It is read for its size, and again when it is embedded: memory holds few."""
    images, skipped, sources = list[ImageBoxes](), list[str](), dict[Path, AnyPicture]()
    for label, (name, shown) in enumerate(pictures.items()):
        for number, picture in enumerate(shown, start=1):
            path = Path(picture if isinstance(picture, Path | str) else f"example {number} of {name} ({label + 1})")
            try:
                height, width = decode(picture).pixels.shape[1:]
            except HdovdError as error:
                skipped.append(str(error))
                continue
            sources[path] = picture
            box, ids = np.array([[0, 0, width, height]], np.float32), np.array([len(images)], np.int64)
            images.append(ImageBoxes(len(images), str(path), width, height, box, np.array([label]), ids))
    names, path_of = _checked(pictures), lambda image: Path(image.file_name)
    return Examples(names, images, path_of, lambda path, *_: Picture(decode(sources[path]).pixels, NO_FILE), skipped)


def _of_annotations(file: Path, folder: Path) -> Examples:
    """Every box is an example of its category, but crowds; categories without any are left out."""
    found = read_instances(file, folder)
    single = {number for number, crowd in zip(found.categories, found.crowd, strict=True) if not crowd}
    names = tuple(name for number, name in found.names.items() if number in single)
    split = load_split(file, folder, Protocol("examples", names, (), min_image_side_px=1), base_only=True)
    log(*split.skips.lines())
    if missing := [image.file_name for image in split.images if not split.path(image).is_file()]:
        raise HdovdError(
            f"--examples {file}: not in {folder}: {len(missing)} of {len(split.images)} pictures "
            f"({shorten(list(missing))}): give their folder with --example-images"
        )
    return Examples(_checked(names), split.images, split.path, in_pictures=True)


def _checked(names: Sequence[str] | Mapping[str, object]) -> tuple[str, ...]:
    """Names without needless spaces. Raises HdovdError for none, and one that cannot be printed or comes twice."""
    found = [" ".join(checked_name(name, "--examples: the name of a class").split()) for name in names]
    alike = [folded(name) for name in found]
    if twice := sorted(name for name, low in zip(found, alike, strict=True) if alike.count(low) > 1):
        raise HdovdError(f"--examples: named twice: {shorten(list(twice))}; each class once, in capitals or not")
    if not found:
        raise HdovdError("--examples: no classes")
    return tuple(found)


def embed_examples(examples: Examples, clip: Teacher, cache: FeatureCache) -> Tensor:
    """(K, D) float32: of each class the normalised mean of its crops' embeddings, made as the boxes of `cache` were.

    Crops that cannot be read are told and left out. Raises HdovdError for a class without any, and for another CLIP or
    preprocessing than the cache's.
    """
    box = np.concatenate([np.zeros((0, 4), np.float32), *(image.boxes for image in examples.images)])
    offset = np.cumsum([0, *(len(image.boxes) for image in examples.images)])
    recipe = extraction_of(cache.set, cache.url, "of the run").recipe
    embedder = embedders_of(clip, Pictures(examples.images, examples.path, offset, box), recipe)[Level.INSTANCE]
    cache.require(Level.INSTANCE, {"clip": clip.identity, **embedder.inputs()})
    rows, problems = embedder.embed(embedder.groups(np.arange(len(box)), BATCH), examples.picture)
    if skipped := [*examples.skipped, *problems.values()]:
        log(f"{counted(len(skipped), 'example')} could not be read, and left out: {shorten(skipped)}")
    good = (np.where(image.id in problems, -1, image.labels) for image in examples.images)
    labels = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *good]))
    of_class = [labels == label for label in range(len(examples.names))]
    if empty := [name for name, mine in zip(examples.names, of_class, strict=True) if not mine.any()]:
        raise HdovdError(f"--examples: no readable crop of {shorten(empty)}")
    log(f"examples: {counted(int((labels >= 0).sum()), 'crop')} of {counted(len(of_class), 'class', 'classes')}")
    unit = F.normalize(torch.from_numpy(rows), dim=1)
    return F.normalize(torch.stack([unit[mine].mean(dim=0) for mine in of_class]), dim=1)


@dataclass(frozen=True, slots=True)
class Gap:
    """From images to texts. image, text (D,): means over base classes of their boxes' and of their names' embeddings;
    spread: mean distance of the names' from `text`.
    """

    image: Tensor
    text: Tensor
    spread: float

    @classmethod
    def of(cls, cache: FeatureCache, texts: Tensor) -> "Gap":
        """From a cache and the text embeddings (B, D) of its base classes.

        The cache does not hold which class a base box is of: it is taken for the one whose text it is nearest to, so
        that a class with many boxes weighs no more than another. Raises HdovdError for a cache without base boxes.
        """
        ids = cache.image_ids()
        some = ids[:: max(1, len(ids) // SAMPLED_IMAGES)].tolist()
        found = np.concatenate([cache.instances(number).base_boxes().embedding for number in some])
        rows = torch.from_numpy(normalised_rows(found[found.any(axis=1)]))  # zeros: of pictures that could not be read
        if not len(rows):
            raise HdovdError(f"{cache.url} has no embeddings of base boxes: examples are compared with them")
        near = (rows @ texts.T).argmax(dim=1)
        image = F.normalize(torch.stack([rows[near == label].mean(dim=0) for label in near.unique()]), dim=1).mean(
            dim=0
        )
        text = texts.mean(dim=0)
        return cls(image, text, float((texts - text).norm(dim=1).mean()))

    def moved(self, rows: Tensor) -> Tensor:
        """Image embeddings (K, D), as normalised rows (K, D) among texts."""
        return F.normalize(self.text + self.spread * F.normalize(rows - self.image, dim=1), dim=1)


ON_IOU, OFF_IOU, OFF = 0.5, 0.3, -1  # a region is on an example from the one on, off all below the other
OFF_REGIONS = 100  # of a picture
KEPT, PRIOR = 10.0, 3000.0  # weights; chosen by base classes (docs/RESULTS.md)
STEPS, RATE = 100, 0.02  # of Adam; more change nothing that counts


@torch.inference_mode(False)
@torch.enable_grad()
def fit_rows(model: Detector, examples: Examples, rows: Tensor, others: Tensor) -> Tensor:
    """(K, D) L2-normalised: rows (K, D) of norm 1, moved until regions on examples are found as their class, and those
    off all examples have the probabilities that they had, as far as that takes no row far.

        sum over regions on examples of -log p + KEPT * sum over the others of KL(before || after)
        + PRIOR * sum over rows of (1 - cosine with what the row was)

    Other classes (O, D) compete. Examples that are crops without their pictures, and detectors that do not tell
    features of regions (`exportable`), leave the rows as they are.
    """
    detector = traceable(model)
    if not examples.in_pictures or not isinstance(detector, ExportableDetector):
        return rows
    found = (_regions(detector, examples, number) for number in range(len(examples.images)))
    c, label = map(torch.cat, zip(*filter(None, found), strict=True))
    on, start, others = label != OFF, rows.to(c).clone(), others.to(c).clone()  # copies, outside of inference mode
    log(f"examples in their pictures: the detector has {counted(int(on.sum()), 'region')} on them")

    def log_probabilities(moved: Tensor) -> Tensor:
        first, _ = detector.scores(c, None, torch.cat([moved, others]))
        return first.clamp(min=1e-12).log()

    before, moved = log_probabilities(start).detach(), start.clone().requires_grad_()
    adam = torch.optim.Adam([moved], lr=RATE)
    for _ in range(STEPS):
        unit = F.normalize(moved, dim=1)
        after = log_probabilities(unit)
        loss = F.nll_loss(after[on], label[on], reduction="sum") + PRIOR * (1 - (unit * start).sum(dim=1)).sum()
        loss = loss + KEPT * F.kl_div(after[~on], before[~on], reduction="sum", log_target=True)
        adam.zero_grad()
        (loss / len(on)).backward()
        adam.step()
    return F.normalize(moved.detach(), dim=1).to(rows)


@torch.no_grad()
def _regions(detector: ExportableDetector, examples: Examples, number: int) -> tuple[Tensor, Tensor] | None:
    """Features (n, D) and labels (n,) of regions of a picture, the class of the example that one is on, or OFF: of all
    that are on examples, and of OFF_REGIONS at most that are off all. None for a picture that cannot be read.
    """
    image, device = examples.images[number], detector.mean.device
    try:
        pixels = examples.picture(examples.path(image), image.width, image.height, Exif.APPLY).pixels
    except HdovdError:
        return None  # its examples are told as left out
    with inference_autocast(device, detector.recipe):
        boxes, c = detector.rois(pixels.to(device))[:2]
    overlap, nearest = box_iou(boxes.float(), torch.from_numpy(image.boxes).to(device)).max(dim=1)
    label = torch.from_numpy(image.labels).to(device)[nearest].where(overlap >= ON_IOU, OFF)
    off = (overlap < OFF_IOU).nonzero().flatten()
    kept = torch.cat([(label != OFF).nonzero().flatten(), off[:: -(-len(off) // OFF_REGIONS) or 1]])
    return c[kept].float(), label[kept]
