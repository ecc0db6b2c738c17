"""The detector of a run in Python: names, scores and boxes of any picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hdovd.core import HdovdError
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.runs import RunFolder


@pytest.fixture(scope="module")
def detector(distilled: RunFolder) -> Detector:
    return Detector.from_run(distilled.path, device="cpu")


def test_what_else_is_in_a_batch_makes_no_difference(detector: Detector, world: Path) -> None:
    files = sorted((world / "val2017").iterdir())
    for one, file in zip(detector.batch(files, 0.0), files, strict=True):
        alone = detector(file, 0.0)
        assert torch.allclose(one.boxes, alone.boxes, atol=1e-3)
        assert torch.allclose(one.scores, alone.scores, atol=1e-5)
        assert one.names == alone.names


def test_names_scores_and_labels_go_together(distilled: RunFolder, world: Path) -> None:
    detector = Detector.from_run(str(distilled.path), device="cpu")
    protocol = distilled.protocol()
    asked = [protocol.novel[1], protocol.base[2].upper(), protocol.base[0]]
    assert detector.set_classes(asked) is detector
    assert detector.is_novel.tolist() == [True, False, False]
    found = detector(next((world / "val2017").iterdir()), 0.0)
    assert len(found.names) == len(found.scores) == len(found.boxes) > 0
    assert found.names == tuple(asked[label] for label in found.labels.tolist())
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    strict = detector(next((world / "val2017").iterdir()), float(found.scores[2]))
    assert strict.scores.tolist() == found.scores[:2].tolist()


def test_boxes_are_of_the_upright_whole_picture(
    detector: Detector, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdovd.pipelines.common import images as picture_decoding

    picture = Image.open(next((world / "val2017").iterdir())).convert("RGB")
    large = picture.resize((picture.width * 4, picture.height * 4), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=exif)
    monkeypatch.setattr(picture_decoding, "KEPT_PIXELS", picture.width * picture.height)  # it is reduced by 4
    expected, found = detector(picture, 0.0), detector(tmp_path / "x.png", 0.0)
    assert torch.allclose(found.boxes, expected.boxes * 4, atol=1e-2)
    assert found.names == expected.names


def test_split_blind_leaves_the_second_score_out(distilled: RunFolder, world: Path) -> None:
    detector, names = Detector.from_run(distilled.path, device="cpu"), distilled.protocol().names
    picture = next((world / "val2017").iterdir())
    combined, blind = detector(picture, 0.0), detector.set_classes(names, split_blind=True)(picture, 0.0)
    assert combined.scores.tolist() != blind.scores.tolist()
    assert detector.set_classes(names)(picture, 0.0).scores.tolist() == combined.scores.tolist()


def test_base_classes_that_were_not_asked_for_take_what_is_theirs(distilled: RunFolder, world: Path) -> None:
    """Novel names alone are found as among all classes; without rivals their scores are higher."""
    detector, protocol = Detector.from_run(distilled.path, device="cpu"), distilled.protocol()
    picture = next((world / "val2017").iterdir())
    everything = detector(picture, 0.0)
    expected = [
        (n, s) for n, s in zip(everything.names, everything.scores.tolist(), strict=True) if n in protocol.novel
    ]
    found = detector.set_classes(protocol.novel)(picture, 0.0)
    assert detector.rivals == protocol.base
    assert len(found.names) > len(expected) > 5  # there is room for more
    assert list(found.names[: len(expected)]) == [name for name, _ in expected]
    np.testing.assert_allclose(found.scores[: len(expected)], [score for _, score in expected], atol=1e-5)
    alone = detector.set_classes(protocol.novel, alone=True)(picture, 0.0)
    assert detector.rivals == ()
    assert alone.scores.mean() > found.scores.mean()
    assert detector.set_classes([protocol.base[0].upper()]).rivals == protocol.base[1:]


def test_embeddings_of_ones_own_stand_for_names(detector: Detector, distilled: RunFolder, world: Path) -> None:
    rows, picture = distilled.class_embeddings(), next((world / "val2017").iterdir())
    own = Detector.from_run(distilled.path, device="cpu").set_classes(
        [f"name {k}" for k in range(len(rows))], embeddings=7 * rows, split_blind=True, alone=True
    )
    expected = Detector.from_run(distilled.path, device="cpu").set_classes(
        distilled.protocol().names, split_blind=True
    )(picture, 0.0)
    found = own(picture, 0.0)
    assert torch.allclose(found.scores, expected.scores, atol=1e-3)
    assert found.labels.tolist()[:3] == expected.labels.tolist()[:3]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "no classes"),
        (["a", " "], "the text '', expected a name"),
        (["Dog", "dog "], "named twice"),
        ("dog", "a list of names"),
    ],
)
def test_names_that_do_not_fit_are_refused(detector: Detector, names: Any, said: str) -> None:
    with pytest.raises(HdovdError, match=said):
        detector.set_classes(names)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.ones(2, 23), r"\(2, 23\), expected \(2, 24\)"),
        (torch.ones(3, 24), r"\(3, 24\)"),
        (torch.zeros(2, 24), "zero"),
        (torch.full((2, 24), torch.nan), "not finite"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(detector: Detector, rows: torch.Tensor, said: str) -> None:
    with pytest.raises(HdovdError, match=said):
        detector.set_classes(["a", "b"], embeddings=rows)
