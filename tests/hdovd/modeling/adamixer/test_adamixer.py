"""Recipes of an AdaMixer that do not fit. What it does is tested with RT-DETR (`queries/test_query_detectors`)."""

import pytest
from adamixer_scenes import small

from hdovd.core import HdovdError


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("detector.backbone.fpn_channels=48", "multiple of 32"),
        ("detector.decoder.heads=5", "decoder.heads"),
        ("detector.proposals.shuffle=16", "shuffle"),
        ("detector.backbone.levels=[4]", "two levels"),
    ],
)
def test_recipes_that_do_not_fit(setting: str, word: str) -> None:
    with pytest.raises(HdovdError, match=word):
        small(setting)
