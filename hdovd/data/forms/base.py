"""What a form of data sets has to say of a folder, the forms by name, and which of them a folder is of.

A split is "train2017" or "val2017", training or validation, whatever the data set itself calls it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hdovd.core import HdovdError
from hdovd.core.registry import Registry

AUTO, COCO = "auto", "coco"
SPLITS = {"train2017": "train", "val2017": "val"}  # and what most data sets call them
FORMS = Registry(
    "--form",
    {
        COCO: "hdovd.data.forms.base:COCO_FILES",
        "lvis": "hdovd.data.forms.base:LVIS_FILES",
        "objects365": "hdovd.data.forms.base:OBJECTS365_FILES",
        "voc": "hdovd.data.forms.converted:VOC",
        "yolo": "hdovd.data.forms.converted:YOLO",
        "label-studio": "hdovd.data.forms.converted:LABEL_STUDIO",
        "cvat": "hdovd.data.forms.converted:CVAT",
    },
)


@dataclass(frozen=True, slots=True)
class Form:
    """Where a folder of this form has what a run needs, as functions of the folder and the split.

    looks_for: patterns of files; a folder that holds one of them is of this form. annotations: the COCO instances file,
    which is converted if need be; a file that is not there stands for a split that is not. images: the folder that its
    file names are relative to, which need not be there. federated: whether the file has to say of each image which
    classes were looked for, as LVIS's do; None: not checked. Functions raise HdovdError for what is wrong with files.
    """

    looks_for: tuple[str, ...]
    annotations: Callable[[Path, str], Path]
    images: Callable[[Path, str], Path]
    federated: bool | None = None


def find_form(name: str, root: Path) -> Form:
    """The form of that name, or of the user's own, `my_module:form`; auto: the one that the folder is of.

    COCO's own files make a folder COCO's whatever lies beside them, such as LVIS's annotations of the same pictures.
    Raises HdovdError for a name of no form, and for a folder of none or of several.
    """
    if name != AUTO:
        if isinstance(form := FORMS.find(name), Form):
            return form
        raise HdovdError(f"--form {name}: expected a Form of hdovd.data.forms.base, found {form!r}")
    if any(any(root.glob(one)) for one in COCO_FILES.looks_for):  # the first: the others need Pillow and more
        return COCO_FILES
    forms = {known: find_form(known, root) for known in FORMS}
    fitting = [known for known, form in forms.items() if any(any(root.glob(one)) for one in form.looks_for)]
    if len(fitting) == 1:
        return forms[fitting[0]]
    if fitting:
        raise HdovdError(f"--data {root} is of several forms: say which with --form {' or '.join(fitting)}")
    looked = "; ".join(f"{name}: {' or '.join(form.looks_for)}" for name, form in forms.items())
    raise HdovdError(f"--data {root} is of no known form. Looked for {looked}. See docs/DATA.md, or give --form")


# --- forms whose annotations are COCO files already: COCO's own, LVIS and Objects365 ---


def _file(root: Path, name: str, folders: tuple[str, ...] = ("annotations", "")) -> Path:
    """The annotations in the first folder that has them, packed by gzip (.gz) or not; the first place if none has."""
    places = [root / folder / f"{name}{packed}" for folder in folders for packed in ("", ".gz")]
    return next((place for place in places if place.is_file()), places[0])


def _lvis_images(root: Path, split: str) -> Path:
    """The root, or what is missing of the folders that pictures lie in: those of LVIS's val are of both."""
    return next((root / name for name in ("train2017", split) if not (root / name).is_dir()), root)


def _patches(root: Path, split: str) -> Path:
    """The folder that holds patch0, patch1, ...; or the root, below which file names lead (images/v1/patch0/...)."""
    return root if (root / "images").is_dir() else root / SPLITS[split]


COCO_FILES = Form(
    ("annotations/instances_*2017.json*",),
    lambda root, split: _file(root, f"instances_{split}.json", ("annotations",)),
    lambda root, split: root / split,
    federated=False,
)
LVIS_FILES = Form(
    ("lvis_v1_*.json*", "annotations/lvis_v1_*.json*"),
    lambda root, split: _file(root, f"lvis_v1_{SPLITS[split]}.json"),
    _lvis_images,
    federated=True,
)
OBJECTS365_FILES = Form(
    ("zhiyuan_objv2_*.json*", "annotations/zhiyuan_objv2_*.json*"),
    lambda root, split: _file(root, f"zhiyuan_objv2_{SPLITS[split]}.json"),
    _patches,
)
