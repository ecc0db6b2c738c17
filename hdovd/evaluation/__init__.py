"""Detections and annotations in, numbers out: COCO AP, TIDE errors, curves, confusion, reliability of scores, recall.

Here the libraries that can count COCO AP: pycocotools, the reference, and faster-coco-eval, the same in C++ and
optional. Importing this file imports neither. An engine is a function of no argument that returns two classes with
pycocotools' interface: of truth and detections (`COCO`), and of what compares them (`COCOeval`).
"""

from enum import StrEnum
from importlib import import_module
from importlib.metadata import version
from typing import Any, cast

from hdovd.core import HdovdError
from hdovd.core.registry import Registry


class Engine(StrEnum):
    """Those that are known by name; the value is the name of the package."""

    PYCOCOTOOLS = "pycocotools"
    FASTER = "faster-coco-eval"


ENGINES = Registry(
    "--engine", {Engine.PYCOCOTOOLS: "hdovd.evaluation:pycocotools", Engine.FASTER: "hdovd.evaluation:faster_coco_eval"}
)


def pycocotools() -> tuple[Any, Any]:
    return import_module("pycocotools.coco").COCO, import_module("pycocotools.cocoeval").COCOeval


def faster_coco_eval() -> tuple[Any, Any]:
    package = import_module("faster_coco_eval")
    return package.COCO, package.COCOeval_faster


def require(engine: str) -> str:
    """The version of an engine's package, or the name of a function that is no package's. Raises HdovdError, with what
    to install, if it cannot be imported.
    """
    classes(engine)
    return version(engine) if engine in ENGINES else engine


def classes(engine: str) -> tuple[Any, Any]:
    """An engine's class for truth and detections, and its class that compares them. Raises HdovdError as `require`
    does.
    """
    try:
        return cast(tuple[Any, Any], ENGINES.find(engine)())
    except ImportError as error:
        extra = "hdovd[fast-eval]" if engine == Engine.FASTER else engine
        raise HdovdError(
            f"the AP engine {engine} cannot be imported ({error}): pip install '{extra}'"
            + (f", or use the engine {Engine.PYCOCOTOOLS}" if engine == Engine.FASTER else "")
        ) from error
