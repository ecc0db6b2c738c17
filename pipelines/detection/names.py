"""What stands for a class: the embedding of its name, a run's own, a kept one, or one of its CLIP, loaded only if it
must be; or of examples, pictures of what to look for.

CLIP's image embeddings and its text embeddings lie in two cones, and detectors are taught with texts. So a row that is
made of pictures is moved from one cone to the other, by what the run's cache knows of its base classes (`Gap`):

    v = normalise(mean of the normalised embeddings of a class's crops)
    row = normalise(text + spread * normalise(v - image))

The pictures are embedded as the boxes of the cache were. A crop is told to CLIP alone; a picture with its boxes also
shows what the detector makes of an example (`detector.fit_rows`). K names, D embedding size.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache import Catalog, KeyInputs, Level, differences, is_tar_form, key_of
from hdovd.cache.reader import FeatureCache, normalised_rows
from hdovd.cache.tar_shards import TarShards
from hdovd.core import HdovdError, counted, log, shorten, user_cache_folder
from hdovd.core.text_files import checked_name
from hdovd.data import ImageBoxes, Protocol, load_split, read_instances
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.images import AnyPicture, decode, find_pictures
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.common.tensors import load_tensors, save_tensors
from hdovd.pipelines.embedding.embedders import NO_FILE, Picture, Pictures, embedders_of, read_picture
from hdovd.pipelines.extraction.source import cache_of, extraction_of
from hdovd.pipelines.runs import DEFAULT_MIX, RunFolder
from hdovd.pipelines.teachers.base import Activation, Name, Teacher, check_templates, folded, said

if TYPE_CHECKING:
    from hdovd.pipelines.teachers.openclip import ClipTeacher

ClipName = tuple[str, str | None]  # name and tag, as `openclip.load_clip` takes them


def class_level(run: RunFolder) -> tuple[KeyInputs, str]:
    """What made the class embeddings of a run, and their key, from its record (run.json). Raises HdovdError if it does
    not say.
    """
    try:
        level = run.record()["cache"]["levels"]["class"]
        return dict(level["inputs"]), str(level["key"])
    except (KeyError, TypeError) as error:
        raise HdovdError(
            f"run.json does not say what made the class embeddings ({error!r}): names other than the run's classes "
            f"need --class-embeddings"
        ) from error


def clip_identity(inputs: KeyInputs) -> KeyInputs:
    """Of the CLIP that made class embeddings; empty if it is not known."""
    clip = inputs.get("text_clip") or inputs.get("clip") or {}  # imports have texts of the CLIP that the user named
    return dict(clip) if "weights_sha256" in clip else {}


def clip_of_cache(run: RunFolder, key: str) -> ClipName:
    """How the cache of a run names the CLIP of its class product `key`. Raises HdovdError if it does not."""
    try:
        url = str(run.cache_url())
        sets = [TarShards(url).meta.features] if is_tar_form(url) else list(Catalog(url).sets().values())
        why = f"no set of {url} says which CLIP made these class embeddings"
    except (HdovdError, OSError, ValueError, ImportError) as error:
        sets, why = [], f"the run's cache cannot be asked ({error})"
    for features in sets:
        if (
            features.levels.get(Level.CLASS) == key
            and "clip" in features.made_from
            and "teacher" not in features.made_from
        ):
            return str(features.made_from["clip"]), features.made_from.get("pretrained")
    raise HdovdError(
        f"other names than the run's classes, and examples, need its CLIP, and it is not known where that is: {why}. "
        f"Give --clip (with --pretrained, as for hdovd extract-clip), or --class-embeddings"
    )


def load_same_clip(
    clip: ClipName,
    inputs: KeyInputs,
    of_classes: KeyInputs,
    device: torch.device,
    *,
    given: bool,
    whose: str,
    without: str,
) -> "ClipTeacher":
    """The CLIP that made embeddings, in the precision of then; that nothing is known of it is told.

    Args:
        inputs: what made the embeddings, of_classes: those of classes.
        given: whether the user said where it lies. whose: "run" or "set", for errors; without: the option that needs no
            CLIP.

    Raises HdovdError if it cannot be had, or is another one.
    """
    identity, (name, pretrained) = clip_identity(inputs), clip
    called = name if pretrained is None else f"{name} with {pretrained}"
    precision = Precision.of(identity.get("compute_dtype")) or Precision.FP32
    if precision is Precision.FP16 and device.type == "cpu":
        raise HdovdError(
            f"the {whose}'s CLIP was computed in float16, which needs a GPU: give --device cuda, or {without}"
        )
    from hdovd.pipelines.teachers.openclip import load_clip

    try:
        loaded = load_clip(
            name,
            pretrained,
            device=str(device),
            precision=precision,
            activation=Activation(identity.get("activation", "auto")),
        )
    except HdovdError as error:
        if given:
            raise
        raise HdovdError(
            f"{error}\nThe {whose}'s cache says that its CLIP is this. If it lies elsewhere now, say where: --clip, "
            f"--pretrained"
        ) from error
    if not identity:
        log(
            f"note: the {whose} does not know which CLIP its embeddings are of: that {called} is the same is taken on "
            f"trust"
        )
    elif lines := differences(identity, loaded.identity, sides=(f"the {whose} has", f"{called} has")):
        raise HdovdError(f"--clip {called} is not the CLIP of the {whose}:\n  " + "\n  ".join(lines))
    else:
        require_tokenizer(loaded, of_classes, called, whose)
    log(f"CLIP: {called}")
    return loaded


def require_tokenizer(clip: Teacher, inputs: KeyInputs, called: str, whose: str) -> None:
    """Raises HdovdError if the CLIP gives other tokens for the names of a class level than `inputs`, what made it,
    say.
    """
    if inputs.get("names") and {"tokens", "templates"} <= inputs.keys():
        synonyms = inputs.get("synonyms", {})
        asked: list[Name] = [tuple(synonyms[row]) if row in synonyms else row for row in inputs["names"]]
        ways = asked, [said(name) for name in asked]  # those of before have underscores in their prompts
        if inputs["tokens"] not in [clip.hash_prompts(names, tuple(inputs["templates"])) for names in ways]:
            raise HdovdError(
                f"--clip {called} has another tokenizer than the {whose}'s CLIP had: it gives other tokens for the "
                f"{whose}'s own classes"
            )


def load_run_clip(run: RunFolder, given: ClipName | None, device: torch.device) -> Teacher:
    """The run's CLIP. given: where it lies, instead of what the cache says. Raises HdovdError if it cannot be had, or
    is another one than the run's.
    """
    inputs, key = class_level(run)
    return load_same_clip(
        given or clip_of_cache(run, key),
        inputs,
        inputs,
        device,
        given=given is not None,
        whose="run",
        without="--class-embeddings",
    )


Shown = Path | str | Mapping[str, Sequence[AnyPicture]]  # a folder, a COCO file, or pictures by name
SAMPLED_IMAGES = 4_000  # of a cache: a mean needs no more
BATCH = 64  # crops
LONGEST_ASKED = 1_000  # characters of a name: it may be a sentence


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
    names, path_of = tuple(told_apart(pictures, "--examples").values()), lambda image: Path(image.file_name)
    return Examples(names, images, path_of, lambda path, *_: Picture(decode(sources[path]).pixels, NO_FILE), skipped)


def _of_annotations(file: Path, folder: Path) -> Examples:
    """Every box is an example of its category, but crowds; categories without any are left out."""
    found = read_instances(file, folder)
    single = set(found.categories[~found.crowd].tolist())
    names = tuple(name for number, name in found.names.items() if number in single)
    split = load_split(file, folder, Protocol("examples", names, (), min_image_side_px=1), base_only=True)
    log(*split.skips.lines())
    if missing := [image.file_name for image in split.images if not split.path(image).is_file()]:
        raise HdovdError(
            f"--examples {file}: not in {folder}: {len(missing)} of {len(split.images)} pictures "
            f"({shorten(list(missing))}): give their folder with --example-images"
        )
    return Examples(tuple(told_apart(names, "--examples").values()), split.images, split.path, in_pictures=True)


def told_apart(names: Iterable[str], what: str) -> dict[str, str]:
    """Names without needless spaces, by what tells them apart. Raises HdovdError for none, two alike, and one that is
    empty or cannot be printed.
    """
    plain = (" ".join(name.split()) if isinstance(name, str) else name for name in names)
    found = [checked_name(name, f"{what}: the name of a class", LONGEST_ASKED) for name in plain]
    times = Counter(map(folded, found))
    if twice := sorted(name for name in found if times[folded(name)] > 1):
        raise HdovdError(f"{what}: named twice: {shorten(list(twice))}; each class once, in capitals or not")
    if not found:
        raise HdovdError(f"{what}: no classes")
    return {folded(name): name for name in found}


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


class NameEmbedder:
    """Embeds names as the classes of a run were: by the same CLIP, in the same prompts and precision, rounded to
    float16 as in a cache.
    """

    def __init__(
        self,
        run: RunFolder,
        device: torch.device,
        *,
        clip: str | None = None,
        pretrained: str | None = None,
        templates: Sequence[str] | None = None,
        kept_in: Path | None = None,
    ) -> None:
        """clip, pretrained: the run's CLIP, where it lies elsewhere than its cache says. templates: other prompts than
        the run's. kept_in: None: the user's cache folder. Raises HdovdError.
        """
        if pretrained is not None and clip is None:
            raise HdovdError("--pretrained goes with --clip")
        if templates is not None:
            check_templates(templates)
        self._run, self._device, self._kept_in = run, device, kept_in or user_cache_folder()
        self._given = None if clip is None else (clip, pretrained)
        self._asked = None if templates is None else tuple(templates)
        self._rows = run.class_embeddings()
        self._place = {folded(name): row for row, name in reversed([*enumerate(run.protocol().names)])}

    @cached_property
    def _clip(self) -> Teacher:
        return load_run_clip(self._run, self._given, self._device)

    @cached_property
    def _gap(self) -> tuple[FeatureCache, Gap]:
        """The run's cache, and what it knows of images and texts."""
        cache = cache_of(self._run)
        return cache, Gap.of(cache, self.own_rows(self._run.protocol().base))

    @property
    def dim(self) -> int:
        return int(self._rows.shape[1])

    def embed(self, names: Sequence[str]) -> Tensor:
        """(K, D) float32. Raises HdovdError if the CLIP is needed and cannot be had, or is not the run's."""
        strange = [name for name in names if folded(name) not in self._place]
        if not names or (not strange and self._asked is None):
            return self.own_rows(names)
        others = self._others(names, strange)
        return torch.stack([others[name] if name in others else self.own_rows([name])[0] for name in names])

    def embed_examples(self, examples: Examples, mix: float = DEFAULT_MIX) -> Tensor:
        """(K, D) float32, L2-normalised: `mix` times the rows of examples, moved among the texts, and (1 - mix) times
        those of their names. Raises HdovdError if the run's cache or its CLIP cannot be had, or a class has no readable
        crop.
        """
        cache, gap = self._gap
        rows = gap.moved(embed_examples(examples, self._clip, cache))
        return rows if mix == 1 else F.normalize(mix * rows + (1 - mix) * self.embed(examples.names), dim=1)

    def own_rows(self, names: Sequence[str]) -> Tensor:
        """(K, D) float32, as the run has them, of classes of its protocol."""
        return self._rows[[self._place[folded(name)] for name in names]].float()

    def forget_clip(self) -> None:
        """Free its memory; it is loaded again when it is needed."""
        self.__dict__.pop("_clip", None)

    def _others(self, names: Sequence[str], strange: list[str]) -> dict[str, Tensor]:
        """Of the names that are no classes of the run, or of all, if they are wanted in other prompts than its."""
        inputs, others = class_level(self._run)[0], strange
        of_run = inputs.get("templates")
        templates = tuple(self._asked or of_run or ())
        if not templates:
            raise HdovdError(
                f"{self._run.path}: the class embeddings came from a file, so there are no prompts for other names: "
                f"give --templates, or --class-embeddings with a row for each name"
            )
        if of_run is not None and templates != tuple(of_run):
            log("note: --templates are not the prompts that the run's classes were embedded with")
            others = [*names]
        if not others:
            return {}
        identity, kept = clip_identity(inputs), dict[str, Tensor]()
        made_by = key_of({"clip": identity, "templates": list(templates), "tokens": inputs.get("tokens")})
        file = self._kept_in / "names" / f"{made_by}.safetensors"
        try:
            if identity and file.is_file():
                kept = {
                    text: row
                    for text, row in load_tensors(file).items()
                    if row.shape == (self.dim,) and row.dtype == torch.float16
                }
        except Exception:  # safetensors has errors of its own, for a file that others delete meanwhile too
            log(f"note: {file} is damaged: names are embedded anew")
        texts = {name: str(said(name)) for name in others}
        asked = list(dict.fromkeys(texts.values()))
        new = self._by_clip([text for text in asked if text not in kept], templates)
        rows = kept | new
        try:
            if identity and new:
                replace_file(file, partial(save_tensors, rows), writer=str(os.getpid()))
        except HdovdError as error:
            log(f"note: text embeddings are not kept for the next time ({error})")
        log(
            f"{len(asked)} name{'s' * (len(asked) > 1)} not of the run's class embeddings: {len(new)} embedded now, "
            f"{len(asked) - len(new)} embedded before; prompts: {shorten(list(templates), 3)}"
        )
        return {name: rows[text].float() for name, text in texts.items()}

    def _by_clip(self, names: list[str], templates: tuple[str, ...]) -> dict[str, Tensor]:
        """(D,) float16 each."""
        if not names:
            return {}
        if self._clip.dim != self.dim:
            raise HdovdError(
                f"this CLIP embeds in {self._clip.dim} values, the run has {self.dim}: it is not the CLIP of the run"
            )
        log(*self._clip.prompt_notes(names, templates))
        rows = torch.from_numpy(self._clip.embed_names(names, templates).astype(np.float16))
        return dict(zip(names, rows, strict=True))
