"""Detection in videos and streams: frame by frame the same as in pictures, and what is written can be played whatever
ends it.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import os
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.common.images import Decoded, find_pictures
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.detection.config import DetectConfig
from hdovd.pipelines.detection.detect import DetectionFolder, detect, detect_lines
from hdovd.pipelines.detection.detector import NamedDetections
from hdovd.pipelines.runs import RunFolder

av = pytest.importorskip("av")
from hdovd.pipelines.detection import video  # noqa: E402

FRAMES, RATE = 20, 10
IDENTITY, ON_ITS_SIDE = (
    struct.pack(">9i", *rows, 0, 0, 1 << 30)
    for rows in ((1 << 16, 0, 0, 0, 1 << 16, 0), (0, 1 << 16, 0, -(1 << 16), 0, 0))
)  # the matrix of a track, which a phone writes


def _encoded(
    frames: Iterator[np.ndarray],
    form: str = "mp4",
    codec: str = "h264",
    rate: int = RATE,
    pixels: str = "yuv420p",
    **options: str,
) -> bytes:
    """(h, w, 3) uint8 each, all of one size, as a video of `rate` frames a second."""
    first = next(frames)
    out = tempfile.NamedTemporaryFile()  # noqa: SIM115 - read below
    with out, av.open(out.name, "w", format=form, options=options) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], pixels
        for values in (first, *frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        file.mux(stream.encode(None))
        file.close()
        return Path(out.name).read_bytes()


def _greys(count: int = FRAMES, width: int = 64, height: int = 48, first: int = 0) -> Iterator[np.ndarray]:
    """Frames each a little lighter than the one before: by their grey they are known. The upper half is black."""
    for number in range(first, first + count):
        pixels = np.full((height, width, 3), 40 + 8 * number, np.uint8)
        pixels[: height // 2] = 0
        yield pixels


def _noise(count: int) -> Iterator[np.ndarray]:
    """Frames that need many bytes."""
    random = np.random.default_rng(0)
    return (random.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(count))


def _stream(frames: int = 90) -> bytes:
    return _encoded(_noise(frames), "mpegts", "mpeg2video", 25)


def _decoded(file: Path) -> list[Any]:
    with av.open(str(file)) as container:
        return list(container.decode(video=0))


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n") or 1 / 0]


@pytest.fixture(scope="module")
def film(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the world, two frames each."""
    pictures = [Image.open(file).convert("RGB").resize((128, 96)) for file in sorted((world / "val2017").iterdir())[:4]]
    file = tmp_path_factory.mktemp("clip") / "clip.mp4"
    file.write_bytes(_encoded(np.asarray(picture) for picture in pictures for _ in range(2)))
    return file


@pytest.fixture
def run_on(distilled: RunFolder, tmp_path: Path) -> Callable[..., DetectionFolder]:
    def run(*words: object, out: str = "out", **changes: Any) -> DetectionFolder:
        given = {"threshold": 0.0, "device": "cpu", "batch_size": 3, **changes}
        return detect(
            DetectConfig(run=distilled.path, images=tuple(map(str, words)), out=tmp_path / out, **given), io.BytesIO()
        )

    return run


# --- what is found, with a real detector ---


def test_frames_are_detected_as_pictures_are(
    run_on: Callable[..., DetectionFolder], film: Path, tmp_path: Path
) -> None:
    frames = _decoded(film)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame.to_ndarray(format="rgb24")).save(tmp_path / "frames" / f"{number}.png")
    of_pictures = run_on(tmp_path / "frames", out="pictures", pictures=False)
    result = run_on(film)
    assert result.objects == of_pictures.objects
    assert result.pictures_with == of_pictures.pictures_with
    tree = json.loads((tmp_path / "pictures" / "images.json").read_text())
    names = {category["id"]: category["name"] for category in tree["categories"]}
    lines = _lines(tmp_path / "out" / "videos" / "clip.jsonl")
    assert [line["frame"] for line in lines] == list(range(8))
    assert [line["time"] for line in lines] == [number / RATE for number in range(8)]
    expected = json.loads((tmp_path / "pictures" / "detections.json").read_text())
    assert len(expected) > 20
    for line, image in zip(lines, tree["images"], strict=True):
        rows = [row for row in expected if row["image_id"] == image["id"]]
        assert line["classes"] == [names[row["category_id"]] for row in rows]
        np.testing.assert_allclose(line["boxes"], [row["bbox"] for row in rows], atol=1e-3)
        np.testing.assert_allclose(line["scores"], [row["score"] for row in rows], atol=1e-5)
    (entry,) = json.loads((tmp_path / "out" / "images.json").read_text())["videos"]
    assert entry == {
        "file_name": str(film),
        "width": 128,
        "height": 96,
        "frames": 8,
        "seconds": 0.7,
        "lines": "videos/clip.jsonl",
        "drawn": "videos/clip.mp4",
        "notes": [],
    }
    printed = detect_lines(result)
    assert printed[0] == f"{film}: 8 frames of 128x96 in 0.7 s"
    assert printed[-1] == f"0 pictures and 1 video, {len(expected)} found"


def test_pictures_and_videos_of_one_folder(
    run_on: Callable[..., DetectionFolder], film: Path, world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.mp4", "deep/A.MP4"):
        (folder / name).write_bytes(film.read_bytes())
    (folder / "a.jpg").write_bytes(next((world / "val2017").iterdir()).read_bytes())
    (folder / "broken.mov").write_bytes(film.read_bytes()[:200])
    (folder / "notes.txt").touch()
    logged: list[str] = []
    with lines_to(logged.append):
        result = run_on(folder, pictures=False)
    assert any("are no pictures or videos, and left out: .txt" in line for line in logged)
    assert any("pictures: 1; videos: 3;" in line for line in logged)
    assert result.images == 1
    assert list(result.videos) == [str(folder / "a.mp4"), str(folder / "deep" / "A.MP4")]
    assert list(result.skipped) == [str(folder / "broken.mov")]
    assert sorted(file.name for file in (tmp_path / "out" / "videos").iterdir()) == ["A-2.jsonl", "a.jsonl"]
    assert "1 picture and 2 videos" in detect_lines(result)[-3]
    run_on(folder / "a.jpg", overwrite=True)
    assert not (tmp_path / "out" / "videos").exists()


def test_without_pyav(
    run_on: Callable[..., DetectionFolder], film: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, before the run is read; and a folder's pictures are looked at."""
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "hdovd.pipelines.detection.video")
    for words in ((film,), ("camera:0",), (film, next((world / "val2017").iterdir()))):
        with pytest.raises(HdovdError, match=r"pip install 'hdovd\[video\]'"):
            run_on(*words)
    assert not (tmp_path / "out").exists()
    folder, logged = tmp_path / "mixed", list[str]()
    folder.mkdir()
    for file in (film, next((world / "val2017").iterdir())):
        (folder / file.name).write_bytes(file.read_bytes())
    with lines_to(logged.append):
        assert run_on(folder, pictures=False).images == 1
    assert any(
        line.endswith("left out: .mp4; hdovd detect reads videos with pip install 'hdovd[video]'") for line in logged
    )


# --- what is read and written, with a detector that finds one box ---


def _look(pictures: Any) -> list[NamedDetections]:
    box, one = torch.tensor([[1.0, 2.0, 11.0, 22.0]]), torch.tensor([0.5])
    return [NamedDetections(box, one, torch.tensor([0]), ("thing",)) for _ in pictures]


def _plain(picture: Decoded, _: NamedDetections) -> Image.Image:
    return Image.fromarray(picture.pixels.permute(1, 2, 0).numpy())


Find = Callable[..., dict[str, Any] | str]


@pytest.fixture
def find(tmp_path: Path) -> Find:
    """Look for that box in what a word names; the files are out/x.*."""

    def found(word: object, **changes: Any) -> dict[str, Any] | str:
        (file,) = find_pictures([str(word)], None, tmp_path / "out", videos=True)
        with StopSignal() as stop:
            given = {"look": _look, "draw": _plain, "batch_size": 4, "every": 1, "stop": stop} | changes
            return video.detect_in_video(file, tmp_path / "out" / "x", **given)

    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.mp4"
    path.write_bytes(_encoded(_greys(), movflags="faststart"))
    return path


@pytest.mark.parametrize("every", [1, 3])
def test_the_drawn_video_has_the_frames_and_times_of_its_source(
    find: Find, file: Path, tmp_path: Path, every: int
) -> None:
    about = find(file, every=every)
    expected, lines = _decoded(file)[::every], _lines(tmp_path / "out" / "x.jsonl")
    assert isinstance(about, dict)
    assert about["frames"] == len(lines) == len(expected)
    assert lines[1] == {
        "frame": every,
        "time": every / RATE,
        "boxes": [[1, 2, 10, 20]],
        "classes": ["thing"],
        "scores": [0.5],
    }
    drawn = _decoded(tmp_path / "out" / "x.mp4")
    assert [frame.time for frame in drawn] == [line["time"] for line in lines] == [frame.time for frame in expected]
    greys = [[int(frame.to_ndarray(format="gray")[40].mean()) for frame in some] for some in (drawn, expected)]
    np.testing.assert_allclose(greys[0], greys[1], atol=3)
    with av.open(str(tmp_path / "out" / "x.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert float(container.streams.video[0].average_rate) == pytest.approx(RATE / every, rel=0.2)


SIZES = [(65, 49), (1, 1), (3, 5), (17, 1), (1, 40), (2, 2)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_odd_sizes(find: Find, tmp_path: Path, width: int, height: int) -> None:
    """H.264 takes even ones: what is drawn is padded, not cut."""
    (tmp_path / "odd.avi").write_bytes(_encoded(_greys(width=width, height=height), "avi", "png", pixels="rgb24"))
    about = find(tmp_path / "odd.avi")
    assert isinstance(about, dict)
    assert (about["width"], about["height"], about["frames"]) == (width, height, FRAMES)
    frames = _decoded(tmp_path / "out" / "x.mp4")
    assert (frames[0].width, frames[0].height) == (width + width % 2, height + height % 2)
    assert len(frames) == FRAMES
    greys = [frame.to_ndarray(format="gray")[height - 1, :width].mean() for frame in frames]
    assert greys[-1] - greys[0] > 100  # the last row is there


def test_a_size_that_no_encoder_takes_is_a_line(find: Find, file: Path) -> None:
    with pytest.raises(HdovdError, match=r"out/x.* cannot be written: .*libx264"):
        find(file, draw=lambda *_: Image.new("RGB", (40_000, 2)))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 5), (17, 1), (500, 1), (4100, 1)])
def test_small_videos_are_drawn(
    run_on: Callable[..., DetectionFolder], tmp_path: Path, width: int, height: int
) -> None:
    (tmp_path / "small.avi").write_bytes(_encoded(_greys(3, width, height), "avi", "png", pixels="rgb24"))
    result = run_on(tmp_path / "small.avi")
    assert not result.skipped
    drawn = _decoded(tmp_path / "out" / "videos" / "small.mp4")
    assert len(drawn) == 3
    assert min(drawn[0].width, drawn[0].height) >= 2


def test_a_phones_video_is_turned_upright(find: Find, tmp_path: Path) -> None:
    """Its upper half is black; lying on its side, the right half of what is shown."""
    data = _encoded(_greys())
    assert data.count(IDENTITY) == 2  # of the film and of its track
    place = data.rindex(IDENTITY)
    (tmp_path / "phone.mp4").write_bytes(data[:place] + ON_ITS_SIDE + data[place + 36 :])
    seen: list[Decoded] = []
    about = find(tmp_path / "phone.mp4", look=lambda pictures: seen.extend(pictures) or _look(pictures))
    assert isinstance(about, dict)
    assert (about["width"], about["height"]) == (48, 64)
    left, right = (half.float().mean() for half in seen[-1].pixels.chunk(2, dim=2))
    assert left > 150 > 20 > right


def test_a_size_that_changes_is_scaled_to_the_first_and_said(find: Find, tmp_path: Path) -> None:
    parts = [_encoded(_greys(8), "mpegts", "mpeg2video", 25), _encoded(_greys(8, 128, 96), "mpegts", "mpeg2video", 25)]
    (tmp_path / "sizes.ts").write_bytes(b"".join(parts))
    seen: list[Decoded] = []
    about = find(tmp_path / "sizes.ts", look=lambda pictures: seen.extend(pictures) or _look(pictures))
    assert isinstance(about, dict)
    assert about["notes"] == ["frames of another size than the first, scaled to it: 8"]
    assert {tuple(one.pixels.shape) for one in seen} == {(3, 48, 64)}
    assert len(_decoded(tmp_path / "out" / "x.mp4")) == len(seen) > 12


def test_of_a_file_that_was_cut_short_the_frames_are_kept(find: Find, tmp_path: Path) -> None:
    data = _encoded(_noise(FRAMES), movflags="faststart")
    (tmp_path / "short.mp4").write_bytes(data[: len(data) * 3 // 4])
    about = find(tmp_path / "short.mp4")
    assert isinstance(about, dict)
    assert 0 < about["frames"] < FRAMES
    assert about["notes"][-1] == f"ended after {about['frames']} frames: the file speaks of {FRAMES}"
    assert len(_decoded(tmp_path / "out" / "x.mp4")) == len(_lines(tmp_path / "out" / "x.jsonl")) == about["frames"]


@pytest.mark.parametrize("flag", ["0", "1"])
def test_streams_in_files_are_known_by_their_packets(tmp_path: Path, flag: str) -> None:
    """As FFmpeg writes them, with times before the packets and without; joined anywhere, too."""
    data = _encoded(_greys(), "mpegts", "mpeg2video", 25, mpegts_m2ts_mode=flag)
    for number, part in enumerate((data, data[1234:], data[: 192 * 5])):
        (tmp_path / f"{number}.mts").write_bytes(part)
        (file,) = find_pictures([str(tmp_path / f"{number}.mts")], None, tmp_path / "out")
        assert file.is_video


def test_typescript_that_is_named_is_a_line(run_on: Callable[..., DetectionFolder], film: Path, tmp_path: Path) -> None:
    (tmp_path / "app.ts").write_text("export const answer = 42;\n" * 50)
    result = run_on(film, tmp_path / "app.ts", pictures=False)
    (reason,) = result.skipped.values()
    assert reason == f"{tmp_path / 'app.ts'}: no picture of a kind that Pillow reads, nor an MPEG-TS video"
    assert len(result.videos) == 1


def test_what_has_no_frames_is_a_line_and_writes_nothing(find: Find, file: Path, tmp_path: Path) -> None:
    sound, silence = io.BytesIO(), av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    silence.sample_rate = 44_100
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        container.mux([*stream.encode(silence), *stream.encode(None)])
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{file}\n#EXT-X-ENDLIST\n"
    for name, data, reason in (
        ("cut.mp4", _encoded(_greys())[:300], "Invalid data"),
        ("empty.mp4", b"", "Invalid data"),
        ("text.mp4", b"no video", "Invalid data"),
        ("sound.mp4", sound.getvalue(), "there is no video in it"),
        ("names others.ts", playlist.encode(), ""),
    ):
        (tmp_path / name).write_bytes(data)
        said = find(tmp_path / name)
        assert isinstance(said, str), name
        assert reason in said
        assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_camera_that_is_not_there(find: Find) -> None:
    assert find("camera:97") == find("/dev/video97") == "No such file or directory"


# --- streams ---


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """The address of a server that sends these bytes to whoever comes, and then says nothing, if `hangs`, or closes."""
    sockets: list[socket.socket] = []
    over = threading.Event()

    def address(data: bytes, *, hangs: bool = False) -> str:
        sockets.append(server := socket.create_server(("127.0.0.1", 0)))

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(data)
                over.wait(60 if hangs else 0)

        threading.Thread(target=answer, daemon=True).start()
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"

    yield address
    over.set()
    for one in sockets:
        one.close()


def test_a_live_stream_drops_its_oldest_frames_and_says_how_many(
    find: Find, serve: Callable[..., str], tmp_path: Path
) -> None:
    def slow(pictures: Any) -> list[NamedDetections]:
        time.sleep(0.3)
        return _look(pictures)

    about = find(serve(_stream()), look=slow)
    assert isinstance(about, dict)
    (note,) = about["notes"]
    what, _, dropped = note.partition(": ")
    assert what == "frames dropped, which came faster than they were looked at"
    assert about["frames"] + int(dropped) == 90
    assert int(dropped) > 0
    numbers = [line["frame"] for line in _lines(tmp_path / "out" / "x.jsonl")]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 89  # the newest are kept
    assert [frame.time for frame in _decoded(tmp_path / "out" / "x.mp4")] == pytest.approx([n / 25 for n in numbers])


def test_a_stream_that_falls_silent(find: Find, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "TIMEOUT_S", 0.5)
    address = serve(b"", hangs=True)
    assert find(address) == "no answer for 0.5 s"
    about = find(serve(_stream(), hangs=True))
    assert isinstance(about, dict)
    assert about["frames"] > 0
    assert about["notes"][-1].endswith("frames: no answer for 0.5 s")
    assert find("tcp://me:s3cret@127.0.0.1:1") == "Connection refused"


def test_a_stream_that_is_joined_in_its_middle(find: Find, serve: Callable[..., str]) -> None:
    data = _encoded(_greys(), "mpegts", rate=25)
    about = find(serve(data[188 * 10 :] + data))
    assert isinstance(about, dict)
    assert about["frames"] > 0


def test_a_file_of_a_web_server_drops_nothing_and_its_password_is_written_nowhere(
    run_on: Callable[..., DetectionFolder], film: Path, tmp_path: Path
) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=film.parent)
    logged: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{server.server_port}"
        words = [
            f"http://me:{secret}@{here}/{name}?key={secret}"
            for secret, name in (("s3cret", "clip.mp4"), ("s3cret", "no.mp4"))
        ]
        with lines_to(logged.append):
            result = run_on(*words)
        server.shutdown()
    assert result.videos == {f"http://{here}/clip.mp4": "8 frames of 128x96 in 0.7 s"}
    assert result.skipped == {f"http://{here}/no.mp4": f"http://{here}/no.mp4: Server returned 404 Not Found"}
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {file.name for file in written} >= {"clip.mp4", "clip.jsonl", "images.json"}
    assert not [file for file in written if b"s3cret" in file.read_bytes()]
    assert "s3cret" not in "\n".join([*logged, *detect_lines(result)])


def _wait_for_lines(file: Path, count: int) -> None:
    for _ in range(2400):
        if file.is_file() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} does not grow")


def test_an_interrupted_stream_is_whole(
    distilled: RunFolder, serve: Callable[..., str], forked: Any, tmp_path: Path
) -> None:
    address = serve(_encoded(_greys(25), "mpegts", "mpeg2video", 25), hangs=True)
    words = ["detect", distilled.path, address, distilled.path / "later.mp4", "--threshold", "0.0", "--batch-size", "1"]
    (distilled.path / "later.mp4").touch()
    child = forked([*words, "--out", "out", "--device", "cpu"], tmp_path)
    file = tmp_path / "out" / "videos" / "127.0.0.1.jsonl"
    _wait_for_lines(file, 4)
    os.kill(child.pid, signal.SIGINT)
    ended = child.wait()
    (distilled.path / "later.mp4").unlink()
    assert ended.returncode == 130, ended.stderr
    lines = _lines(file)
    assert len(lines) >= 4
    assert len(_decoded(file.with_suffix(".mp4"))) == len(lines)
    assert f"{len(lines)} frames of 64x48" in ended.stdout
    assert "later.mp4: not read, stopped before" in ended.stdout
    tree = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [entry["frames"] for entry in tree["videos"]] == [len(lines)]
    assert tree["videos"][0]["notes"][-1].endswith(": stopped")
    assert len(tree["skipped"]) == 1
    assert not (tmp_path / "out" / "detections.jsonl").exists()


def test_a_killed_process_leaves_a_video_that_can_be_played(
    find: Find, serve: Callable[..., str], tmp_path: Path
) -> None:
    address = serve(_stream(900), hangs=True)

    def look(pictures: Any) -> list[NamedDetections]:
        time.sleep(0.004)  # that the decoder is not dropped behind
        return _look(pictures)

    pid = os.fork()
    if pid == 0:
        find(address, look=look, batch_size=16)
        os._exit(9)
    _wait_for_lines(tmp_path / "out" / "x.jsonl", 400)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    with av.open(str(tmp_path / "out" / "x.mp4")) as container:
        frames = 0
        with contextlib.suppress(av.error.InvalidDataError):  # its last frame may be cut
            for _ in container.decode(video=0):
                frames += 1
    assert frames >= 200


# --- the frames on their way ---


def _frames(count: int) -> list[video.Frame]:
    picture = Decoded(torch.zeros(3, 1, 1, dtype=torch.uint8), 1, 1)
    return [video.Frame(number, number, picture) for number in range(count)]


def _numbers(frames: list[video.Frame]) -> list[int]:
    return [frame.number for frame in frames]


def test_a_full_queue_of_a_live_stream_drops_the_oldest() -> None:
    queue = video.FrameQueue(4, live=True)
    assert all(queue.put(frame) for frame in _frames(10))
    assert queue.dropped == 6
    stop = StopSignal()
    assert _numbers(queue.take(3, stop)) == [6, 7, 8]
    assert _numbers(queue.take(3, stop)) == [9]  # what is there: no waiting for a whole batch
    queue.put(_frames(1)[0])
    stop.signals.append(signal.SIGINT)
    assert queue.take(3, stop) == []
    queue.end()
    assert _numbers(queue.take(3, StopSignal())) == [0]
    assert queue.take(3, StopSignal()) == []


def test_a_full_queue_of_a_file_makes_its_reader_wait() -> None:
    queue, put = video.FrameQueue(4, live=False), list[int]()

    def fill() -> None:
        for frame in _frames(10):
            queue.put(frame)
            put.append(frame.number)
        queue.end()

    reader = threading.Thread(target=fill)
    reader.start()
    taken = []
    while frames := queue.take(3, StopSignal()):
        taken.append([frame.number for frame in frames])
        assert len(put) <= sum(map(len, taken)) + 4
    reader.join()
    assert taken == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert queue.dropped == 0


def test_a_reader_whose_frames_nobody_wants_stops() -> None:
    queue, wanted = video.FrameQueue(2, live=False), list[bool]()
    reader = threading.Thread(target=lambda: wanted.extend(queue.put(frame) for frame in _frames(3)))
    reader.start()
    while len(wanted) < 2:
        time.sleep(0.01)
    queue.end()
    reader.join(10)
    assert wanted == [True, True, False]
