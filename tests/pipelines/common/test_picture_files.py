"""Which pictures words of a command line name."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.common.images import PictureFile, find_pictures, printable


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, from which the tests run: names and nothing in them, for finding reads no picture."""
    for name in (
        "photos/b.jpg",
        "photos/a.PNG",
        "photos/deep/er/c.webp",
        "photos/.hidden/d.jpg",
        "photos/.e.jpg",
        "photos/notes.txt",
        "photos/f[1].jpg",
        "photos/raw",
        "out/pictures/b.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _found(*words: str, stdin: bytes = b"", out: str = "out", log: list[str] | None = None) -> list[str]:
    with lines_to(([] if log is None else log).append):
        return [picture.name for picture in find_pictures(words, io.BytesIO(stdin), Path(out))]


def test_a_folder_gives_its_pictures_and_those_of_its_folders(photos: Path) -> None:
    log: list[str] = []
    assert _found("photos", log=log) == ["photos/a.PNG", "photos/b.jpg", "photos/f[1].jpg", "photos/deep/er/c.webp"]
    assert len(log) == 1
    assert ".txt" in log[0]
    assert "(none)" in log[0]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("photos/*.jpg", ["photos/b.jpg", "photos/f[1].jpg"]),
        ("photos/**/*.webp", ["photos/deep/er/c.webp"]),
        ("photos/f[1].jpg", ["photos/f[1].jpg"]),  # a file of this name stands before the pattern
        ("photos/raw", ["photos/raw"]),
        ("photos/n*", ["photos/notes.txt"]),
    ],
)
def test_files_and_patterns(photos: Path, word: str, expected: list[str]) -> None:
    assert _found(word) == expected


@pytest.mark.parametrize("between", [b"\n", b"\r\n", b"\0"])
def test_paths_by_standard_input(photos: Path, between: bytes) -> None:
    names = ["photos/b.jpg", "not there.jpg", "P1.jpg"]
    assert _found("-", stdin=between.join([*map(str.encode, names), b""])) == names
    assert _found("-", stdin=b"\xef\xbb\xbf" + between.join(map(str.encode, names))) == names


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_a_picture_by_standard_input(photos: Path, kind: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(data, kind)
    (picture,) = find_pictures(["-"], io.BytesIO(data.getvalue()), Path("out"))
    assert picture.data == data.getvalue()
    assert picture.name == "standard input"


def test_each_picture_is_taken_once(photos: Path) -> None:
    log: list[str] = []
    assert _found("photos/b.jpg", "photos/*.jpg", str(photos / "photos/b.jpg"), log=log) == [
        "photos/b.jpg",
        "photos/f[1].jpg",
    ]
    assert log == ["note: pictures that are named more than once, and taken once: 2"]


def test_what_was_drawn_before_is_no_input(photos: Path) -> None:
    log: list[str] = []
    assert "out/pictures/b.jpg" not in _found(".", log=log)
    assert any("left out" in line and "out" in line for line in log)


@pytest.mark.parametrize("word", ["nothing.jpg", "photos/*.xyz", "-", "photos/.hidden/none"])
def test_words_that_give_nothing_are_errors(photos: Path, word: str) -> None:
    with pytest.raises(HdovdError, match=r"no such file|no pictures"):
        _found("photos/b.jpg", word)


def test_an_empty_folder_is_an_error(photos: Path) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(HdovdError, match="empty: no pictures"):
        _found("empty")


def test_names_need_not_be_text(photos: Path) -> None:
    name = os.fsdecode(b"photos/\xff.jpg")
    Path(name).touch()
    assert name in _found("photos")
    assert printable(name) == "photos/\N{REPLACEMENT CHARACTER}.jpg"


# --- videos ---


def test_videos_are_found_where_they_are_asked_for(photos: Path) -> None:
    for name in ("photos/v.mp4", "photos/deep/W.MOV", "photos/.hidden/x.mkv"):
        Path(name).touch()
    log: list[str] = []
    assert "photos/v.mp4" not in _found("photos", log=log)
    assert "left out: (none), .mov, .mp4, .txt; hdovd detect reads videos with pip install 'hdovd[video]'" in log[0]
    with lines_to(log.append):
        found = find_pictures(["photos"], None, Path("out"), videos=True)
    assert [file.name for file in found if file.is_video] == ["photos/v.mp4", "photos/deep/W.MOV"]
    assert sum(not file.is_video for file in found) == 4
    assert log[1].endswith("are no pictures or videos, and left out: (none), .txt")


def test_typescript_is_no_video(photos: Path) -> None:
    """Its endings are those of MPEG-TS, which is known by its packets."""
    packets, script = b"G" + bytes(187), b"GGGG = 'G';\nexport const Gallery = 1;\n" * 40
    streams = {"a.ts": packets * 9, "b.MTS": (bytes(4) + packets) * 9, "c.ts": b"cut" + packets * 5, "d.m2ts": b""}
    for name, data in (streams | {"app.ts": script, "app.mts": script, "t.d.ts": b"G", "none.ts": b""}).items():
        Path("photos", name).write_bytes(data)
    log: list[str] = []
    with lines_to(log.append):
        found = find_pictures(["photos"], None, Path("out"), videos=True)
        named = find_pictures(["photos/*.ts"], None, Path("out"))
    assert [file.path.name for file in found if file.is_video] == sorted(streams)
    assert log[0].endswith("are no pictures or videos, and left out: (none), .mts, .ts, .txt")
    assert [file.path.name for file in named if file.is_video] == ["a.ts", "c.ts"]
    assert PictureFile(Path("photos/none at all.ts")).is_video  # who opens it says that there is none
    for name in streams:
        Path("photos", name).unlink()
    log.clear()
    assert not any(name.endswith("ts") for name in _found("photos", log=log))
    assert "pip install" not in log[0]


@pytest.mark.parametrize(
    ("word", "name", "stem"),
    [
        ("rtsp://me:secret@camera:554/live/ch1.sdp?token=secret", "rtsp://camera:554/live/ch1.sdp", "ch1"),
        ("tcp://192.0.2.7:9000", "tcp://192.0.2.7:9000", "192.0.2.7"),
        ("udp://@:1234", "udp://:1234", "stream"),
        ("camera:2", "camera:2", "camera2"),
        ("/dev/video0", "camera:0", "camera0"),
    ],
)
def test_streams_and_cameras(photos: Path, word: str, name: str, stem: str) -> None:
    (file,) = find_pictures([word, word], None, Path("."))
    assert (file.name, file.path.stem, file.is_video) == (name, stem, True)
    assert "secret" not in file.name
