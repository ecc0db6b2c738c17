"""The libraries that can count COCO AP: pycocotools, the reference, and faster-coco-eval, the same in C++ and optional.

Importing this file imports neither.
"""

import importlib
from enum import StrEnum
from importlib.metadata import version
from typing import Any

from hdovd.core.errors import HdovdError


class Engine(StrEnum):
    """The value is the name of the package."""

    PYCOCOTOOLS = "pycocotools"
    FASTER = "faster-coco-eval"


CLASSES = {
    Engine.PYCOCOTOOLS: (("pycocotools.coco", "COCO"), ("pycocotools.cocoeval", "COCOeval")),
    Engine.FASTER: (("faster_coco_eval", "COCO"), ("faster_coco_eval", "COCOeval_faster")),
}


def require(engine: Engine) -> str:
    """The version of an engine's package. Raises HdovdError, with what to install, if it cannot be imported."""
    classes(engine)
    return version(engine.value)


def classes(engine: Engine) -> tuple[Any, Any]:
    """An engine's class for truth and detections, and its class that compares them. Raises HdovdError as `require`
    does.
    """
    try:
        truth, comparison = (getattr(importlib.import_module(module), name) for module, name in CLASSES[engine])
        return truth, comparison
    except ImportError as error:
        extra = "hdovd[fast-eval]" if engine is Engine.FASTER else engine.value
        raise HdovdError(
            f"the AP engine {engine.value} cannot be imported ({error}): pip install '{extra}'"
            + (f", or use the engine {Engine.PYCOCOTOOLS}" if engine is Engine.FASTER else "")
        ) from error
