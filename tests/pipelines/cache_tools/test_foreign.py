"""Published embeddings: each format written here as its authors write it, and read back."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hdovd.core import HdovdError
from hdovd.data import Protocol, Split, load_split
from hdovd.pipelines.cache_tools.importing import FULL, GT, PROPOSAL, TEXT, ForeignImage, read_hd_ovd, read_oadp

D = 6
PROTOCOL = Protocol("small", ("cat", "dog"), ("bird",))
# Image ids out of order, as in COCO's file; 5 has no base box, 8 has a side under 32 px.
IMAGES = {40: (200, 100), 7: (100, 100), 5: (100, 100), 8: (100, 31), 23: (64, 64)}
KEPT = [40, 7, 23]


def _annotation(number: int, image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
    } | more


ANNOTATIONS = [
    _annotation(101, 7, 1, [10, 10, 20, 20]),
    _annotation(104, 40, 2, [-5, 50, 60, 60]),  # over the edge
    _annotation(103, 40, 1, [0, 0, 50, 50]),
    _annotation(102, 40, 3, [5, 5, 50, 50]),  # novel
    _annotation(105, 40, 1, [0, 0, 90, 90], iscrowd=1),
    _annotation(106, 40, 2, [100, 20, 30, 40]),
    _annotation(107, 5, 3, [5, 5, 50, 50]),
    _annotation(108, 8, 1, [5, 5, 20, 20]),
    _annotation(109, 23, 2, [5, 5, 20, 20]),
    _annotation(110, 23, 2, [70, 5, 20, 20]),  # outside
]


def _write_split(root: Path, annotations: list[dict[str, Any]]) -> Split:
    (root / "train2017").mkdir(parents=True, exist_ok=True)
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": w, "height": h} for i, (w, h) in IMAGES.items()]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "bird"}]
    (root / "a.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return load_split(root / "a.json", root / "train2017", PROTOCOL, base_only=True)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    made = _write_split(tmp_path, ANNOTATIONS)
    assert [image.id for image in made.images] == KEPT
    assert made.images[0].annotation_ids.tolist() == [104, 103, 106]
    return made


def _random(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape) * 3).to(dtype)  # as CLIP gives them: far from norm 1


def _expected(rows: Tensor) -> np.ndarray:
    values = rows.float().numpy()
    return values / np.sqrt((values * values).sum(-1, keepdims=True))


def _boxes(rng: np.random.Generator, count: int, width: int, height: int) -> np.ndarray:
    corner = rng.uniform(0, 0.4, (count, 2)) * (width, height)
    return np.concatenate([corner, corner + rng.uniform(0.1, 0.5, (count, 2)) * (width, height)], 1).astype(np.float32)


def _by_id(found: Iterable[ForeignImage]) -> dict[int, ForeignImage]:
    return {image.image_id: image for image in found}


def _evil(marker: Path) -> Any:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.system, (f"touch '{marker}'",)

    return Evil()


class HdOvd:
    """A folder of HD-OVD's: `files` by image id and `proposals` by place, to change before `read`."""

    def __init__(self, root: Path, split: Split, dtype: torch.dtype, columns: int) -> None:
        self.root, self.split = root, split
        rng = np.random.default_rng(1)
        counts = {40: 4, 7: 2, 5: 3, 8: 1, 23: 5}
        self.proposals: list[Any] = []
        for i, (w, h) in IMAGES.items():
            scores = rng.uniform(size=(counts[i], 1)).astype(np.float32)
            self.proposals.append(np.concatenate([_boxes(rng, counts[i], w, h), scores], 1)[:, :columns])
        rows = {40: 3, 7: 1, 5: 0, 8: 1, 23: 1}
        self.files: dict[int, Any] = {
            i: {
                GT: _random(rng, rows[i], D, dtype=dtype),
                PROPOSAL: _random(rng, counts[i], D, dtype=dtype),
                TEXT: _random(rng, counts[i], D, dtype=dtype),
                FULL: _random(rng, 1, D, dtype=dtype),
            }
            for i in IMAGES
        }

    def file(self, image_id: int) -> Path:
        return self.root / "embeddings" / f"{image_id:012d}.pth"

    def write(self) -> None:
        self.file(1).parent.mkdir(exist_ok=True)
        for image_id, content in self.files.items():
            torch.save(content, self.file(image_id))
        (self.root / "p.pkl").write_bytes(pickle.dumps(self.proposals, 2))

    def read(self, write: bool = True) -> dict[int, ForeignImage]:
        if write:
            self.write()
        return _by_id(read_hd_ovd(self.root / "embeddings", self.root / "p.pkl", self.split))


@pytest.fixture
def hd_ovd(tmp_path: Path, split: Split) -> HdOvd:
    return HdOvd(tmp_path, split, torch.float16, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [4, 5])
def test_hd_ovd_values_and_order(tmp_path: Path, split: Split, dtype: torch.dtype, columns: int) -> None:
    written = HdOvd(tmp_path, split, dtype, columns)
    found = written.read()
    assert list(found) == KEPT
    for place, image_id in enumerate(IMAGES):
        if image_id not in KEPT:
            continue
        image, content, proposals = found[image_id], written.files[image_id], written.proposals[place]
        assert image.reason is None
        assert image.base_embedding is not None
        assert image.proposal_text is not None
        assert image.image_embedding is not None
        np.testing.assert_allclose(image.base_embedding, _expected(content[GT]), rtol=1e-6)
        np.testing.assert_allclose(image.proposal_embedding, _expected(content[PROPOSAL]), rtol=1e-6)
        np.testing.assert_allclose(image.proposal_text, _expected(content[TEXT]), rtol=1e-6)
        np.testing.assert_allclose(image.image_embedding, _expected(content[FULL])[0], rtol=1e-6)
        np.testing.assert_array_equal(image.proposal_box, proposals[:, :4])
        np.testing.assert_array_equal(
            image.proposal_score, proposals[:, 4] if columns == 5 else np.ones(len(proposals))
        )
        assert image.dropped == 0
        for array in (
            image.base_embedding,
            image.proposal_box,
            image.proposal_score,
            image.proposal_embedding,
            image.proposal_text,
            image.image_embedding,
        ):
            assert array.dtype == np.float32


def test_hd_ovd_rows_of_norm_one_stay(hd_ovd: HdOvd) -> None:
    rows = torch.eye(D)[[3, 0, 5]]
    hd_ovd.files[40][GT] = rows
    found = hd_ovd.read()[40].base_embedding
    assert found is not None
    np.testing.assert_array_equal(found, rows.numpy())


def test_hd_ovd_proposals_are_cut_to_the_image_and_lose_their_row_outside_it(hd_ovd: HdOvd) -> None:
    nan = float("nan")
    hd_ovd.proposals[0] = np.array(
        [
            [-5, 10, 30, 120, 0.1],
            [200, 0, 240, 50, 0.9],
            [20, 20, 10, 40, 0.8],
            [50, 60, 250, 90, 0.7],
            [1, 2, 3, nan, 0.6],
            [1, 1, 9, 9, nan],
            [5, 5, 5, 20, 0.4],
        ],
        np.float32,
    )
    rng = np.random.default_rng(3)
    for key in (PROPOSAL, TEXT):
        hd_ovd.files[40][key] = _random(rng, 7, D)
    hd_ovd.files[40][PROPOSAL][1] = 0  # a row that cannot be normalised, of a box that is left out
    image = hd_ovd.read()[40]
    assert image.reason is None
    assert image.proposal_box.tolist() == [[0, 10, 30, 100], [50, 60, 200, 90]]  # in the file's order, not by score
    assert image.proposal_score.tolist() == [np.float32(0.1), np.float32(0.7)]
    assert image.dropped == 5
    np.testing.assert_allclose(image.proposal_embedding, _expected(hd_ovd.files[40][PROPOSAL][[0, 3]]), rtol=1e-6)
    assert image.proposal_text is not None
    np.testing.assert_allclose(image.proposal_text, _expected(hd_ovd.files[40][TEXT][[0, 3]]), rtol=1e-6)


@pytest.mark.parametrize("empty", [np.zeros((0, 5), np.float32), np.zeros((0, 4)), np.zeros(0)])
@pytest.mark.parametrize("rows", [0, 1])
def test_hd_ovd_image_without_proposals(hd_ovd: HdOvd, empty: np.ndarray, rows: int) -> None:
    """Their loader puts a box of zeros there, so there may be a row for it."""
    hd_ovd.proposals[1] = empty
    hd_ovd.files[7] |= {PROPOSAL: torch.zeros(rows, D), TEXT: torch.zeros(rows, D)}
    image = hd_ovd.read()[7]
    assert image.reason is None
    assert image.proposal_box.shape == (0, 4)
    assert image.proposal_embedding.shape == (0, D)
    assert image.base_embedding is not None


def test_hd_ovd_without_text(hd_ovd: HdOvd) -> None:
    del hd_ovd.files[7][TEXT]
    image = hd_ovd.read()[7]
    assert image.proposal_text is None
    assert image.reason is None


def test_hd_ovd_file_of_a_nested_picture_name(tmp_path: Path, split: Split, hd_ovd: HdOvd) -> None:
    tree = json.loads((tmp_path / "a.json").read_text())
    tree["images"][1]["file_name"] = "part/a.b.JPG"
    (tmp_path / "a.json").write_text(json.dumps(tree))
    hd_ovd.split = load_split(tmp_path / "a.json", tmp_path / "train2017", PROTOCOL, base_only=True)
    hd_ovd.write()
    hd_ovd.file(7).rename(tmp_path / "embeddings" / "a.b.pth")
    assert [image.reason for image in hd_ovd.read(write=False).values()] == [None] * 3


def test_hd_ovd_missing_and_damaged_files_cost_their_image(hd_ovd: HdOvd) -> None:
    hd_ovd.write()
    hd_ovd.file(40).unlink()
    hd_ovd.file(7).write_bytes(hd_ovd.file(7).read_bytes()[:700])
    found = hd_ovd.read(write=False)
    assert found[40].reason == f"no file {hd_ovd.file(40)}"
    assert found[40].base_embedding is None
    assert len(found[40].proposal_box) == len(found[40].proposal_embedding) == 0
    assert str(hd_ovd.file(7)) in str(found[7].reason)
    assert "damaged" in str(found[7].reason)
    assert found[23].reason is None


@pytest.mark.parametrize("zipped", [True, False])
def test_hd_ovd_file_that_asks_for_more_than_tensors(hd_ovd: HdOvd, tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "it ran"
    hd_ovd.write()
    torch.save(hd_ovd.files[7] | {"note": _evil(marker)}, hd_ovd.file(7), _use_new_zipfile_serialization=zipped)
    reason = str(hd_ovd.read(write=False)[7].reason)
    assert not marker.exists()
    assert "asks for posix.system" in reason
    assert "weights_only" not in reason
    torch.load(hd_ovd.file(7), weights_only=False)
    assert marker.exists()  # the attack is a live one


def test_hd_ovd_proposals_that_ask_for_more_than_arrays(hd_ovd: HdOvd, tmp_path: Path) -> None:
    hd_ovd.proposals[2] = _evil(tmp_path / "it ran")
    with pytest.raises(HdovdError, match=r"p\.pkl was not loaded: its pickle asks for posix\.system"):
        hd_ovd.read()
    assert not (tmp_path / "it ran").exists()


def _change(key: str, make: Callable[[Tensor], Any]) -> Callable[[HdOvd], None]:
    def change(folder: HdOvd) -> None:
        folder.files[40][key] = make(folder.files[40][key])

    return change


def _drop(folder: HdOvd) -> None:
    del folder.files[40][GT]


def _no_dict(folder: HdOvd) -> None:
    folder.files[40] = torch.zeros(3)


def _other_boxes(folder: HdOvd) -> None:
    folder.proposals[0] = np.zeros((4, 6), np.float32)


def _spoilt(row: int, value: float) -> Callable[[Tensor], Tensor]:
    def spoil(rows: Tensor) -> Tensor:
        return rows.index_fill(0, torch.tensor([row]), value)

    return spoil


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_change(GT, lambda t: t[:2]), [GT, "(2, 6)", "expected 3 rows for 3 base boxes"]),
        (_change(GT, lambda t: torch.cat([t, t])), ["(6, 6)", "expected 3 rows"]),
        (_change(GT, lambda t: t[0]), ["(6,)", "expected 3 rows"]),
        (_change(PROPOSAL, lambda t: t[:3]), [PROPOSAL, "(3, 6)", "expected 4 rows for 4 boxes in p.pkl", "order"]),
        (_change(TEXT, lambda t: t[:1]), [TEXT, "(1, 6)", "expected 4 rows"]),
        (_change(FULL, lambda t: torch.cat([t, t])), [FULL, "(2, 6)", "expected one row"]),
        (_change(GT, _spoilt(1, float("nan"))), [GT, "1 of 3 rows", "rows 1"]),
        (_change(PROPOSAL, _spoilt(2, 0)), [PROPOSAL, "1 of 4 rows", "rows 2"]),
        (_change(TEXT, _spoilt(0, float("inf"))), [TEXT, "1 of 4 rows", "rows 0"]),
        (_change(FULL, lambda t: t * 0), [FULL, "1 of 1 rows"]),
        (_change(GT, lambda t: t.int()), [GT, "no tensor of floating-point numbers"]),
        (_change(GT, lambda t: t.tolist()), [GT, "found a list"]),
        pytest.param(
            _change(GT, lambda t: t.float().to_sparse()),
            [GT, "no tensor of floating-point"],
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
        ),
        (_change(GT, lambda t: torch.empty(3, D, device="meta")), [GT, "no tensor of floating-point"]),
        (_change(GT, lambda t: torch.ones(1, 1).expand(3, 10**12)), [GT, "(3, 1000000000000)", "over 4 bytes"]),
        (_change(GT, lambda t: t[:, :4].clone()), ["size 4, 6, expected one size"]),
        (_drop, ["holds proposal_clip_image_embedding", f"expected {GT}, {PROPOSAL}"]),
        (_no_dict, ["holds a Tensor"]),
        (_other_boxes, ["p.pkl: entry 0", "expected (n, 4) or (n, 5) numbers, found float32 (4, 6)"]),
    ],
)
def test_hd_ovd_content_that_does_not_fit_costs_its_image(
    hd_ovd: HdOvd, change: Callable[[HdOvd], None], words: list[str]
) -> None:
    change(hd_ovd)
    found = hd_ovd.read()
    assert all(word in str(found[40].reason) for word in words), found[40].reason
    assert found[7].reason is None
    assert found[23].reason is None


def test_embeddings_of_two_clips(hd_ovd: HdOvd) -> None:
    hd_ovd.files[7] = {key: torch.cat([rows, rows], 1) for key, rows in hd_ovd.files[7].items()}
    found = hd_ovd.read()
    assert found[40].reason is found[23].reason is None
    assert "size 12, expected 6 as in the images before" in str(found[7].reason)


@pytest.mark.parametrize(
    "more",
    [
        _annotation(200, 40, 1, [10, 10, 0.5, 20]),
        _annotation(200, 40, 1, [10, 10, 20, 20], area=0),
        _annotation(200, 40, 1, [10, 10, 20, 20], ignore=True),
    ],
)
def test_base_box_that_the_published_trainer_leaves_out(tmp_path: Path, more: dict[str, Any]) -> None:
    """It has no row there. Rows as many as our boxes would be of another filter, so they are refused as well."""
    split = _write_split(tmp_path, [*ANNOTATIONS, more])
    written = HdOvd(tmp_path, split, torch.float16, 5)
    assert "no embedding of annotations 200" in str(written.read()[40].reason)
    written.files[40][GT] = torch.ones(4, D)
    assert "no embedding of annotations 200" in str(written.read()[40].reason)
    assert written.read()[7].reason is None


def test_thin_base_box_without_an_area_stays(tmp_path: Path) -> None:
    """Without `area` in the annotation, mmdetection looks at no side."""
    thin = _annotation(200, 40, 1, [10, 10, 0.5, 20])
    del thin["area"]
    written = HdOvd(tmp_path, _write_split(tmp_path, [*ANNOTATIONS, thin]), torch.float16, 5)
    written.files[40][GT] = torch.ones(4, D)
    assert written.read()[40].reason is None


def test_hd_ovd_proposals_for_other_annotations(hd_ovd: HdOvd) -> None:
    hd_ovd.proposals.pop()
    with pytest.raises(HdovdError, match=r"p\.pkl is no .* file of .*a\.json: .* list of 5 arrays, .*found one of 4"):
        hd_ovd.read()
    hd_ovd.proposals = {"boxes": 1}  # type: ignore[assignment]
    with pytest.raises(HdovdError, match=r"p\.pkl is no HD-OVD proposal file of .*found a dict"):
        hd_ovd.read()


def test_hd_ovd_folder_that_is_none(tmp_path: Path, split: Split) -> None:
    with pytest.raises(HdovdError, match=r"no folder .*none, or it holds no \.pth: expected the HD-OVD embeddings"):
        read_hd_ovd(tmp_path / "none", tmp_path / "p.pkl", split)
    with pytest.raises(HdovdError, match=r"holds no \.pth"):
        read_hd_ovd(tmp_path, tmp_path / "p.pkl", split)


class Oadp:
    """An `oake` folder."""

    def __init__(self, root: Path, split: Split, folder: str = "train2017", images: bool = True) -> None:
        self.root, self.split, self.folder = root / "oake", split, folder
        rng = np.random.default_rng(2)
        self.objects: dict[int, Any] = {}
        self.images: dict[int, Any] = {}
        for count, image_id in enumerate(KEPT, 3):
            boxes = _boxes(rng, count, *IMAGES[image_id])
            self.objects[image_id] = {
                "embeddings": torch.nn.functional.normalize(_random(rng, count, D, dtype=torch.float32)).half(),
                "bboxes": torch.from_numpy(boxes).half(),
                "objectness": torch.rand(count, 1).half(),
            }
            if images:
                self.images[image_id] = torch.nn.functional.normalize(
                    _random(rng, D, dtype=torch.float32), dim=0
                ).half()

    def read(self) -> dict[int, ForeignImage]:
        for kind, contents in (("objects", self.objects), ("globals", self.images)):
            for image_id, content in contents.items():
                file = self.root / kind / self.folder / f"{image_id:012d}.pth"
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(content, file)
        return _by_id(read_oadp(self.root, self.split))


@pytest.mark.parametrize("folder", ["train2017", "."])
def test_oadp_values_best_first(tmp_path: Path, split: Split, folder: str) -> None:
    written = Oadp(tmp_path, split, folder)
    found = written.read()
    assert list(found) == KEPT
    for image_id, image in found.items():
        content = written.objects[image_id]
        scores = content["objectness"][:, 0]
        order = scores.argsort(descending=True)
        assert image.reason is None
        assert image.base_embedding is None
        assert image.proposal_text is None
        assert image.image_embedding is not None
        np.testing.assert_array_equal(image.proposal_score, scores[order].float().numpy())
        np.testing.assert_array_equal(image.proposal_box, content["bboxes"][order].float().numpy())
        np.testing.assert_allclose(image.proposal_embedding, _expected(content["embeddings"][order]), rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(image.proposal_embedding, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(image.image_embedding, _expected(written.images[image_id]), rtol=1e-6)
        for array in (image.proposal_box, image.proposal_score, image.proposal_embedding, image.image_embedding):
            assert array.dtype == np.float32


def test_oadp_without_globals_or_with_a_row_for_one(tmp_path: Path, split: Split) -> None:
    found = Oadp(tmp_path / "a", split, images=False).read()
    assert all(image.image_embedding is None and image.reason is None for image in found.values())
    written = Oadp(tmp_path / "b", split)
    written.images[7] = written.images[7][None]  # their loader takes (1, D) as well
    image = written.read()[7].image_embedding
    assert image is not None
    assert image.shape == (D,)


def test_oadp_boxes_are_cut_to_the_image(tmp_path: Path, split: Split) -> None:
    written = Oadp(tmp_path, split)
    written.objects[40] = {
        "embeddings": torch.eye(D)[:3].half(),
        "objectness": torch.tensor([0.25, 0.75, 0.5]).half(),
        "bboxes": torch.tensor([[-3.0, 5, 40, 101], [210, 0, 220, 5], [190, 90, 200.5, 100]]).half(),
    }
    image = written.read()[40]
    assert image.proposal_box.tolist() == [[190, 90, 200, 100], [0, 5, 40, 100]]
    assert image.proposal_score.tolist() == [0.5, 0.25]
    np.testing.assert_array_equal(image.proposal_embedding, np.eye(D, dtype=np.float32)[[2, 0]])
    assert image.dropped == 1


def test_oadp_misfits_cost_their_image(tmp_path: Path, split: Split) -> None:
    def reason(key: str, value: Any, part: str = "objects") -> str:
        written = Oadp(tmp_path, split)
        if part == "objects":
            written.objects[40][key] = value
        else:
            written.images[40] = value
        found = written.read()
        assert found[7].reason is None
        return str(found[40].reason)

    assert "embeddings has shape (2, 6), expected 3 rows for 3 bboxes" in reason("embeddings", torch.ones(2, D))
    assert "objectness has 4 rows, expected one for each of the 3 bboxes" in reason("objectness", torch.ones(4, 1))
    assert "expected (n, 4) numbers, found float32 (3, 5)" in reason("bboxes", torch.ones(3, 5))
    assert "found a list" in reason("bboxes", [[1, 2, 3, 4]])
    assert "globals" in reason("", torch.ones(2, D), "globals")
    assert "rows 0, 1, 2" in reason("embeddings", torch.zeros(3, D))
    assert "size 6, 9" in reason("", torch.ones(9), "globals")
    (tmp_path / "oake" / "objects" / "train2017" / f"{7:012d}.pth").unlink()
    (tmp_path / "oake" / "globals" / "train2017" / f"{23:012d}.pth").unlink()
    found = _by_id(read_oadp(tmp_path / "oake", split))
    assert f"no file {tmp_path / 'oake' / 'objects' / 'train2017' / '000000000007.pth'}" == found[7].reason
    assert f"no file {tmp_path / 'oake' / 'globals' / 'train2017' / '000000000023.pth'}" == found[23].reason


def test_oadp_file_that_asks_for_more_than_tensors(tmp_path: Path, split: Split) -> None:
    written = Oadp(tmp_path, split)
    written.images[7] = _evil(tmp_path / "it ran")
    assert "asks for posix.system" in str(written.read()[7].reason)
    assert not (tmp_path / "it ran").exists()


def test_oadp_folder_that_is_none(tmp_path: Path, split: Split) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(HdovdError, match=r"no \.pth in .*objects.train2017.*give the oake folder"):
            read_oadp(folder, split)
