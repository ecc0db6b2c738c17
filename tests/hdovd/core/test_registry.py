"""Names that stand for code: known ones, the user's own, and mistakes that are told before anything is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hdovd.core import HdovdError
from hdovd.core.registry import Registry
from hdovd.evaluation import ENGINES, classes

KNOWN = Registry("--part", {"square": "math:isqrt", "root": "math:sqrt"})


def test_known_names_and_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_part_of_a_test.py").write_text("def cube(x):\n    return x**3\n")
    assert KNOWN.find("root")(9) == 3
    assert KNOWN.find("own_part_of_a_test:cube")(2) == 8
    more = Registry("--part", KNOWN)
    more["cube"] = "own_part_of_a_test:cube"
    assert more.find("cube")(3) == 27


@pytest.mark.parametrize("name", ["rot", "", "math", ":sqrt", "math:"])
def test_mistakes_are_told_with_what_is_known(name: str) -> None:
    with pytest.raises(HdovdError, match=rf"^--part '{name}'.*: expected square, root, or my_module:name of your own"):
        KNOWN.require(name)


def test_what_is_near_is_named() -> None:
    with pytest.raises(HdovdError, match="did you mean root"):
        KNOWN.find("rot")


def test_an_engine_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_engine_of_a_test.py").write_text(
        "def engine():\n"
        "    from pycocotools.coco import COCO\n"
        "    from pycocotools.cocoeval import COCOeval\n"
        "    return COCO, COCOeval\n"
    )
    assert classes("own_engine_of_a_test:engine") == classes("pycocotools")
    assert ENGINES.keys() == {"pycocotools", "faster-coco-eval"}
