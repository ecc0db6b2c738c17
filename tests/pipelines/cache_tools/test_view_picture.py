"""The picture of `hdovd cache view`: names in any script, cut where they are too long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hdovd.cache import Source
from hdovd.pipelines.cache_tools.view import CacheView, Likeness, ViewRow, draw_view
from hdovd.pipelines.common.drawing import cut_label, label_font

needs_font = pytest.mark.skipif(
    label_font("سظ", 16) is label_font("", 16), reason="no font with these characters on this machine"
)


@needs_font
@pytest.mark.parametrize("part", ["noun", "class_name", "nearest"])
def test_names_of_other_scripts_are_no_squares(part: str) -> None:
    def drawn(name: str) -> np.ndarray:
        given: dict[str, Any] = {"class_name": None, "nouns": (), "nearest": ()}
        given |= {
            "noun": {"nouns": (Likeness(name, 0.3),)},
            "class_name": {"class_name": name},
            "nearest": {"nearest": (Likeness(name, 0.3),)},
        }[part]
        source = Source.BASE_BOX if part == "class_name" else Source.PROPOSAL
        row = ViewRow(
            box=(5.0, 5.0, 60.0, 40.0), source=source, score=0.5, cosine=0.3, weight=None, annotation_id=None, **given
        )
        return np.asarray(draw_view(CacheView(1, None, (80, 60), (row,), (), None, ()), None))

    assert not np.array_equal(drawn("س"), drawn("ظ"))  # squares are all alike


@pytest.mark.parametrize(
    "text", ["umbrella", "a very long name of some thing", pytest.param("سظ" * 30, marks=needs_font)]
)
def test_a_label_is_cut_to_its_width(text: str) -> None:
    cut = cut_label(text, 90, 16)
    assert label_font(cut, 16).getlength(cut) <= 90
    assert cut == text or (cut.endswith("...") and text.startswith(cut[:-3]))
    assert (cut == text) == (label_font(text, 16).getlength(text) <= 90)
    assert cut_label(text, 10_000, 16) == text
