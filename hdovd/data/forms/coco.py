"""Forms whose annotations are COCO files already: COCO's own, LVIS and Objects365."""

from pathlib import Path

from hdovd.data.forms.base import SPLITS, Form


def _file(root: Path, name: str, folders: tuple[str, ...] = ("annotations", "")) -> Path:
    """The annotations in the first folder that has them, packed by gzip (.gz) or not; the first place if none has."""
    places = [root / folder / f"{name}{packed}" for folder in folders for packed in ("", ".gz")]
    return next((place for place in places if place.is_file()), places[0])


def _lvis_images(root: Path, split: str) -> Path:
    """The root, or what is missing of the folders that pictures lie in: those of LVIS's val are of both."""
    needed = (root / name for name in SPLITS if name in ("train2017", split))
    return next((folder for folder in needed if not folder.is_dir()), root)


def _patches(root: Path, split: str) -> Path:
    """The folder that holds patch0, patch1, ...; or the root, below which file names lead (images/v1/patch0/...)."""
    return root if (root / "images").is_dir() else root / SPLITS[split]


COCO = Form(
    ("annotations/instances_*2017.json*",),
    lambda root, split: _file(root, f"instances_{split}.json", ("annotations",)),
    lambda root, split: root / split,
    federated=False,
)
LVIS = Form(
    ("lvis_v1_*.json*", "annotations/lvis_v1_*.json*"),
    lambda root, split: _file(root, f"lvis_v1_{SPLITS[split]}.json"),
    _lvis_images,
    federated=True,
)
OBJECTS365 = Form(
    ("zhiyuan_objv2_*.json*", "annotations/zhiyuan_objv2_*.json*"),
    lambda root, split: _file(root, f"zhiyuan_objv2_{SPLITS[split]}.json"),
    _patches,
)
