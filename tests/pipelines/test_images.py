"""Reading pictures: any kind comes as RGB, and what is not the annotated picture is an error that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdovd.coco import ImageBoxes, Skips, Split
from hdovd.errors import HdovdError
from hdovd.pipelines.images import read_image, read_pixels


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
    nothing = np.zeros(0, np.int64)
    image = ImageBoxes(7, "a.png", 8, 6, np.zeros((0, 4), np.float32), nothing, nothing)
    split = Split([image], tmp_path, tmp_path / "x.json", (), Skips())
    assert torch.equal(read_pixels(split, image), torch.from_numpy(noise).permute(2, 0, 1))
    (tmp_path / "a.png").unlink()
    with pytest.raises(HdovdError, match=r"image 7: .*a\.png"):
        read_pixels(split, image)
