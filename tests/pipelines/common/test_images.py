"""Pictures of all kinds become upright RGB of 8 bits, the same ones in every command; what cannot be read, or is not
the annotated picture, is an error that names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hdovd.core import HdovdError, picture_header
from hdovd.data import Exif, ImageBoxes, Skips, Split
from hdovd.pipelines.common import images
from hdovd.pipelines.common.images import decode, read_annotated, read_image, read_pixels
from hdovd.pipelines.embedding.embedders import read_picture

# How a camera stored the upright picture for each EXIF orientation: what undoes the turn that the tag asks for.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(6, 10, 3) uint8 without any symmetry."""
    return np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)


def _decoded(file: Path) -> np.ndarray:
    return decode(file).pixels.permute(1, 2, 0).numpy()


def _saved(picture: Image.Image, orientation: int, file: Path, **options: Any) -> Path:
    turn = STORED[orientation]
    return _tagged(picture if turn is None else picture.transpose(turn), orientation, file, **options)


def _tagged(picture: Image.Image, orientation: int, file: Path, **options: Any) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(file, exif=exif, **options)
    return file


def _split(folder: Path, name: str, width: int, height: int) -> Split:
    nothing = np.zeros(0, np.int64)
    image = ImageBoxes(7, name, width, height, np.zeros((0, 4), np.float32), nothing, nothing)
    return Split([image], folder, folder / "x.json", (), Skips())


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
    assert _decoded(tmp_path / "x.tif")[0, :, 0].tolist() == [
        int(255 * (v - low) / max(high - low, 1) + 0.5) for v in values
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([-3.0, np.nan, 7.0], [0, 0, 255]), ([2.0, 2.0, 2.0], [0, 0, 0])],
)
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
def test_large_pictures_are_reduced_and_keep_their_size_in_mind(
    orientation: int, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEPT_PIXELS", 3000)
    picture = Image.new("RGB", (200, 100), "blue")
    picture.paste("red", (0, 0, 100, 100))  # the left half
    found = decode(_saved(picture, orientation, tmp_path / f"x.{ending}", quality=95))
    assert (found.width, found.height) == (200, 100)
    assert found.pixels.shape == (3, 34, 67) or found.pixels.shape == (
        3,
        25,
        50,
    )  # by 3, or a JPEG by 4 or, by 2 and then by 2
    left, right = found.pixels[:, :, :20].float().mean((1, 2)), found.pixels[:, :, -20:].float().mean((1, 2))
    assert left[0] > 200 > 50 > left[2]
    assert right[2] > 200 > 50 > right[0]


def test_a_large_palette_is_not_averaged_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "KEPT_PIXELS", 100)
    picture = Image.new("P", (40, 40))
    picture.putpalette([200, 0, 0, 0, 0, 0, 200, 0, 0])
    picture.putdata([0, 2] * 800)  # two numbers of one colour; the number between them is black
    picture.save(tmp_path / "x.png")
    assert (_decoded(tmp_path / "x.png") == [200, 0, 0]).all()


def test_a_picture_beyond_pillows_limit_is_read_and_the_limit_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (60, 50)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(tmp_path / "x.png").pixels.shape == (3, 50, 60)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_picture_beyond_our_limit_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (60, 50)).save(tmp_path / "x.png")
    monkeypatch.setattr(picture_header, "MOST_PIXELS", 2999)
    with pytest.raises(HdovdError, match=r"x\.png has 60x50 pixels, more than the 2,999"):
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
    forms: list[Any] = [
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
        Image.fromarray(pixels),
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        (tmp_path / "x.png").read_bytes(),
    ]
    for form in forms:
        assert np.array_equal(decode(form).pixels.permute(1, 2, 0).numpy(), pixels)


def test_a_pil_image_stays_as_it_is(pixels: np.ndarray, tmp_path: Path) -> None:
    with Image.open(_saved(Image.fromarray(pixels), 6, tmp_path / "x.png")) as stored:
        assert decode(stored).pixels.shape == (3, 10, 6)  # boxes have to fit this image, which lies on its side


@pytest.mark.parametrize(
    "picture",
    [
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(3, 4, 4),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(1, 3, 4, 4),
        7,
        None,
    ],
)
def test_other_things_are_refused(picture: Any) -> None:
    with pytest.raises(HdovdError, match="a picture"):
        decode(picture)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_picture_of_any_kind_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (20, 10)).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    image = read_image(next(tmp_path.iterdir()), 20, 10)
    assert image.mode == "RGB"
    assert image.size == (20, 10)


def test_size_that_disagrees_names_both(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    with pytest.raises(HdovdError, match=r"a\.png.*20x10.*10x20"):
        read_image(tmp_path / "a.png", 10, 20)


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "tif", "bmp", "webp"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.7])
def test_file_that_is_cut_off_is_an_error_that_names_it(tmp_path: Path, kind: str, part: float) -> None:
    """Whatever its decoder raises."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    file = tmp_path / f"a.{kind}"
    Image.fromarray(noise).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(HdovdError, match="a." + kind):
        read_image(file, 80, 60)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damage_in_the_middle_never_escapes_as_another_error(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    rng = np.random.default_rng(1)
    for kind in ("jpg", "png", "gif", "tif", "bmp", "webp"):
        file = tmp_path / f"a.{kind}"
        Image.fromarray(noise).save(file)
        content = bytearray(file.read_bytes())
        for _ in range(60):
            damaged = bytearray(content)
            for place in rng.integers(0, min(len(content), 400), 6):
                damaged[place] = rng.integers(256)
            file.write_bytes(damaged)
            try:
                read_image(file, 80, 60)
            except HdovdError as error:
                assert file.name in str(error)  # noqa: PT017


def test_pixels_keep_their_places(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    split = _split(tmp_path, "a.png", 8, 6)
    assert torch.equal(read_pixels(split, split.images[0]), torch.from_numpy(noise).permute(2, 0, 1))
    (tmp_path / "a.png").unlink()
    with pytest.raises(HdovdError, match=r"image 7: .*a\.png"):
        read_pixels(split, split.images[0])


# What a file holds, and the mean of the picture that every command sees. 145 of 255 grey levels is 37265 of 65535.
KINDS = {
    "grey": (Image.new("L", (8, 6), 145), "png", 145),
    "grey of 16 bits": (Image.fromarray(np.full((6, 8), 145 * 257, np.uint16)), "png", 145),
    "grey of 16 bits, TIFF": (Image.fromarray(np.full((6, 8), 145 * 257, np.uint16)), "tif", 145),
    "floats": (Image.fromarray(np.linspace(-1, 3, 48, dtype=np.float32).reshape(6, 8)), "tif", 127.5),
    "32 bits": (Image.fromarray(np.linspace(0, 4e6, 48).astype(np.int32).reshape(6, 8)), "tif", 127.5),
    "half see-through black": (Image.new("RGBA", (8, 6), (0, 0, 0, 128)), "png", 127),
    "see-through": (Image.new("LA", (8, 6), (10, 0)), "png", 255),
    "palette": (Image.new("RGB", (8, 6), (145, 145, 145)).quantize(2), "png", 145),
    "CMYK": (Image.new("CMYK", (8, 6), (110, 110, 110, 0)), "tif", 145),
    "CMYK with black": (Image.new("CMYK", (8, 6), (0, 0, 0, 110)), "tif", 145),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_sees_the_same_levels(kind: str, tmp_path: Path) -> None:
    picture, ending, mean = KINDS[kind]
    picture.save(tmp_path / f"x.{ending}")
    split = _split(tmp_path, f"x.{ending}", 8, 6)
    read = read_pixels(split, split.images[0])
    assert read.float().mean().item() == pytest.approx(mean, abs=0.6)
    assert torch.equal(read, decode(tmp_path / f"x.{ending}").pixels)
    assert torch.equal(read, read_picture(tmp_path / f"x.{ending}", 8, 6, Exif.APPLY).pixels)


@pytest.mark.parametrize("exif", Exif)
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_the_annotated_size_decides_whether_a_picture_is_turned_and_the_setting_where_both_fit(
    orientation: int, annotated: str, exif: Exif, tmp_path: Path
) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    stored = Image.fromarray(upright)
    turn = STORED[orientation]
    stored = stored if turn is None else stored.transpose(turn)
    _tagged(stored, orientation, tmp_path / "x.png")
    width, height = (10, 6) if annotated == "upright" else stored.size
    found, decided = read_annotated(tmp_path / "x.png", width, height, None, exif)
    either = 2 <= orientation <= 4
    turned = exif is Exif.APPLY if either else annotated == "upright"
    assert decided == either
    assert np.array_equal(np.asarray(found), upright if turned else np.asarray(stored))


def test_a_size_that_fits_neither_way_names_exif(tmp_path: Path) -> None:
    _tagged(Image.new("RGB", (20, 10)), 6, tmp_path / "a.jpg")
    with pytest.raises(
        HdovdError, match=r"a\.jpg is 20x10 \(10x20 as its EXIF orientation 6 turns it\), the annotation says 30x20"
    ):
        read_image(tmp_path / "a.jpg", 30, 20)


def test_no_command_opens_pictures_beside_the_reader() -> None:
    """`Image.open` of what is no picture of a data set: files that tell themselves apart from lists, and the demo's
    own.
    """
    folder = Path(images.__file__).resolve().parents[2]
    files = [file for floor in ("hdovd", "pipelines", "cache", "cli") for file in (folder / floor).rglob("*.py")]
    found = {file.resolve().relative_to(folder).as_posix() for file in files if "Image.open(" in file.read_text()}
    assert found == {f"pipelines/{name}.py" for name in ("demo/run",)} | {"hdovd/core/picture_header.py"}
