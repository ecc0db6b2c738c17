"""Pictures of all kinds become upright RGB of 8 bits; what cannot be read is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hdovd.errors import HdovdError
from hdovd.pipelines import picture_decoding
from hdovd.pipelines.picture_decoding import decode

# How a camera stored the upright picture for each EXIF orientation: what undoes the turn that the tag asks for.
STORED = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(6, 10, 3) uint8 without any symmetry."""
    return np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)


def _decoded(file: Path) -> np.ndarray:
    return decode(file).pixels.permute(1, 2, 0).numpy()


def _saved(picture: Image.Image, orientation: int, file: Path, **options: Any) -> Path:
    exif, turn = Image.Exif(), STORED[orientation]
    exif[0x0112] = orientation
    (picture if turn is None else picture.transpose(turn)).save(file, exif=exif, **options)
    return file


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_pictures_are_turned_upright(pixels: np.ndarray, orientation: int, ending: str, tmp_path: Path) -> None:
    found = decode(_saved(Image.fromarray(pixels), orientation, tmp_path / f"x.{ending}"))
    assert np.array_equal(found.pixels.permute(1, 2, 0).numpy(), pixels)
    assert (found.width, found.height) == (10, 6)


@pytest.mark.parametrize("ending", ["tif", "png", "pgm"])
def test_grey_of_16_bits_keeps_its_levels(ending: str, tmp_path: Path) -> None:
    """Of whatever mode Pillow reads it with: 32 bits, for some kinds."""
    levels = np.array([[0, 255, 256, 32768, 65280, 65535]])
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / f"x.{ending}")
    assert _decoded(tmp_path / f"x.{ending}")[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255, 255)]


def test_grey_of_16_bits_on_its_side_keeps_its_levels(tmp_path: Path) -> None:
    levels = np.array([[0], [256], [32768]])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "x.png", exif=exif)
    assert _decoded(tmp_path / "x.png")[0, :, 0].tolist() == [128, 1, 0]


@pytest.mark.parametrize("values", [[0, 51, 255], [0, 200, 1000], [-40_000, -20_000, 60_000], [7, 7, 7]])
def test_grey_of_32_bits_is_stretched(values: list[int], tmp_path: Path) -> None:
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "x.tif")
    low, high = min(values), max(values)
    assert _decoded(tmp_path / "x.tif")[0, :, 0].tolist() == [int(255 * (v - low) / max(high - low, 1) + 0.5) for v in values]


@pytest.mark.parametrize(("values", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([-3.0, np.nan, 7.0], [0, 0, 255]),
                                                  ([2.0, 2.0, 2.0], [0, 0, 0])])
def test_floats_are_stretched(values: list[float], expected: list[int], tmp_path: Path) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "x.tif")
    assert _decoded(tmp_path / "x.tif")[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 3), (255, 255, 255) if mode == "1" else (102, 102, 102)).convert(mode)
    picture.save(tmp_path / "x.tif" if mode in ("CMYK", "YCbCr") else tmp_path / "x.png")
    (file,) = tmp_path.iterdir()
    assert np.abs(_decoded(file).astype(int) - (255 if mode == "1" else 102)).max() <= 2


@pytest.mark.parametrize("palette", [False, True])
def test_what_can_be_seen_through_stands_on_white(palette: bool, tmp_path: Path) -> None:
    if palette:
        picture = Image.new("P", (2, 1))
        picture.putpalette([10, 20, 30, 40, 50, 60])
        picture.putdata([0, 1])
        picture.save(tmp_path / "x.png", transparency=1)
    else:
        Image.fromarray(np.array([[[10, 20, 30, 255], [40, 50, 60, 0]]], np.uint8)).save(tmp_path / "x.png")
    assert _decoded(tmp_path / "x.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_an_animation_gives_its_first_picture(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second])
    assert _decoded(tmp_path / "x.gif")[0, 0].tolist() == [255, 0, 0]


# --- large pictures ---

@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_large_pictures_are_reduced_and_keep_their_size_in_mind(orientation: int, ending: str, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_decoding, "KEPT_PIXELS", 3000)
    picture = Image.new("RGB", (200, 100), "blue")
    picture.paste("red", (0, 0, 100, 100))  # the left half
    found = decode(_saved(picture, orientation, tmp_path / f"x.{ending}", quality=95))
    assert (found.width, found.height) == (200, 100)
    assert found.pixels.shape == (3, 34, 67) or found.pixels.shape == (3, 25, 50)  # by 3, or a JPEG by 4 or, by 2 and then by 2
    left, right = found.pixels[:, :, :20].float().mean((1, 2)), found.pixels[:, :, -20:].float().mean((1, 2))
    assert left[0] > 200 > 50 > left[2]
    assert right[2] > 200 > 50 > right[0]


def test_a_large_palette_is_not_averaged_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_decoding, "KEPT_PIXELS", 100)
    picture = Image.new("P", (40, 40))
    picture.putpalette([200, 0, 0, 0, 0, 0, 200, 0, 0])
    picture.putdata([0, 2] * 800)  # two numbers of one colour; the number between them is black
    picture.save(tmp_path / "x.png")
    assert (_decoded(tmp_path / "x.png") == [200, 0, 0]).all()


def test_a_picture_beyond_pillows_limit_is_read_and_the_limit_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (60, 50)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(tmp_path / "x.png").pixels.shape == (3, 50, 60)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_picture_beyond_our_limit_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (60, 50)).save(tmp_path / "x.png")
    monkeypatch.setattr(picture_decoding, "MOST_PIXELS", 2999)
    with pytest.raises(HdovdError, match=r"x\.png: 60x50 pixels are more than the 2,999"):
        decode(tmp_path / "x.png")


# --- refusals ---

@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(40)])
def test_what_is_no_picture_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(HdovdError, match=r"x\.jpg"):
        decode(tmp_path / "x.jpg")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_half_a_picture_is_refused(pixels: np.ndarray, ending: str, tmp_path: Path) -> None:
    Image.fromarray(np.tile(pixels, (20, 20, 1))).save(tmp_path / f"x.{ending}")
    data = (tmp_path / f"x.{ending}").read_bytes()
    (tmp_path / f"x.{ending}").write_bytes(data[: len(data) // 2])
    with pytest.raises(HdovdError, match=rf"x\.{ending}"):
        decode(tmp_path / f"x.{ending}")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="none: no such file"):
        decode(tmp_path / "none")
    with pytest.raises(HdovdError, match="is a folder"):
        decode(tmp_path)


# --- pictures in memory ---

def test_pictures_in_memory_are_the_same_in_all_forms(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "x.png")
    forms: list[Any] = [pixels, torch.from_numpy(pixels).permute(2, 0, 1), Image.fromarray(pixels), tmp_path / "x.png",
                        str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes()]
    for form in forms:
        assert np.array_equal(decode(form).pixels.permute(1, 2, 0).numpy(), pixels)


def test_a_pil_image_stays_as_it_is(pixels: np.ndarray, tmp_path: Path) -> None:
    with Image.open(_saved(Image.fromarray(pixels), 6, tmp_path / "x.png")) as stored:
        assert decode(stored).pixels.shape == (3, 10, 6)  # boxes have to fit this image, which lies on its side


@pytest.mark.parametrize("picture", [torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(3, 4, 4), np.zeros((4, 4), np.uint8),
                                     np.zeros((3, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), torch.zeros(1, 3, 4, 4), 7, None])
def test_other_things_are_refused(picture: Any) -> None:
    with pytest.raises(HdovdError, match="a picture"):
        decode(picture)
