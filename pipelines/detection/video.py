"""Detection in a video, a stream or a camera: `hdovd detect`. No other module imports PyAV.

A thread decodes ahead of the detector, a few frames, so that memory stays bounded: of a file it waits for room, of a
live stream the oldest frame is dropped and counted. Frames keep their times: what is drawn plays as fast as the source.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from fractions import Fraction
from pathlib import Path
from threading import Condition
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hdovd.core import HdovdError, counted
from hdovd.pipelines.common.atomic_write import writing
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.images import Decoded, PictureFile, decode
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.detection.detector import NamedDetections

try:
    import av
except ImportError as error:
    raise HdovdError("videos need PyAV: pip install 'hdovd[video]'") from error

TIMEOUT_S = 10.0  # without a sign of a stream
LOOK_EVERY_S = 0.2  # for a signal, while no frame comes
USUAL_RATE = Fraction(25)  # frames a second, where a video does not say
WHOLE_AT_ANY_TIME = {"movflags": "hybrid_fragmented", "flush_packets": "1"}  # of an MP4 that is being written
KEY_EVERY_S = 2  # and is cut there, or before, if the process is killed


class Frame(NamedTuple):
    """number, from 0: of all frames of the video. pts: since the first one, in units of the stream's time base.
    picture: upright, in the size of the first one.
    """

    number: int
    pts: int
    picture: Decoded


class FrameQueue:
    """At most `most` frames between the thread that decodes and the one that takes them. `live`: a full queue drops its
    oldest frame, which `dropped` counts; else who puts waits.
    """

    def __init__(self, most: int, *, live: bool) -> None:
        self._frames, self._most, self._live = deque[Frame](maxlen=most), most, live
        self._change, self._ended, self.dropped = Condition(), False, 0

    def put(self, frame: Frame) -> bool:
        """Whether more is wanted."""
        with self._change:
            self._change.wait_for(lambda: self._live or len(self._frames) < self._most or self._ended)
            self.dropped += self._live and len(self._frames) == self._most
            self._frames.append(frame)  # in the place of the oldest, if it is full
            self._change.notify_all()
            return not self._ended

    def end(self) -> None:
        """No more frames come, or are wanted."""
        with self._change:
            self._ended = True
            self._change.notify_all()

    def take(self, most: int, stop: StopSignal) -> list[Frame]:
        """The next frames: `most`, or of a live stream those that are there. None at the end, or after a signal."""
        with self._change:
            while not (self._ended or stop.received or len(self._frames) >= (1 if self._live else most)):
                self._change.wait(LOOK_EVERY_S)
            self._change.notify_all()
            return [self._frames.popleft() for _ in range(0 if stop.received else min(most, len(self._frames)))]


class _Reader:
    """Decodes a video into its queue. `frames` were read, `resized` of them of another size than the first, `damaged`
    packets passed over; `reason`: why it ended before its end.
    """

    def __init__(self, container: Any, ahead: int, every: int, *, live: bool) -> None:
        self._container, self._every, self.stream = container, every, container.streams.video[0]
        self.queue, self.frames, self.reason = FrameQueue(ahead, live=live), 0, ""
        self.rate = self.stream.average_rate or self.stream.guessed_rate or USUAL_RATE
        self._first, self._pts, self.damaged, self.resized = None, -1, 0, 0

    def run(self) -> None:
        """Until the end, an error, or nobody wants more."""
        try:
            for packet in self._container.demux(self.stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:  # a stream that is joined between two key frames has such, too
                    self.damaged += 1
                    continue
                for made in map(self._made, frames):
                    if made.number % self._every == 0 and not self.queue.put(made):
                        return
            if self.frames < self.stream.frames:  # FFmpeg takes a file that was cut short for one that ends
                self.reason = f"the file speaks of {self.stream.frames:,d}"
        except (av.error.FFmpegError, HdovdError) as error:
            self.reason = _reason(error)
        finally:
            self.queue.end()

    def _made(self, frame: Any) -> Frame:
        first = self._first = self._first or frame
        self.resized += (frame.width, frame.height) != (first.width, first.height)
        timed = frame.pts is not None and first.pts is not None
        pts = frame.pts - first.pts if timed else round(self.frames / self.rate / self.stream.time_base)
        self._pts, self.frames = max(pts, self._pts + 1), self.frames + 1  # a time is later than the one before
        pixels = frame.to_ndarray(format="rgb24", width=first.width, height=first.height)
        return Frame(self.frames - 1, self._pts, decode(np.rot90(pixels, first.rotation // 90)))


class _Movie:
    """A video file that can be played while it is written."""

    def __init__(self, to: Path, canvas: Image.Image, rate: Fraction, time_base: Fraction) -> None:
        self._file: Any = av.open(os.path.abspath(f"{to}.mp4"), "w", options=WHOLE_AT_ANY_TIME)
        self._stream: Any = self._file.add_stream(
            self._file.default_video_codec,
            rate=rate,
            width=canvas.width + canvas.width % 2,  # even, as 4:2:0 needs: a black line is added
            height=canvas.height + canvas.height % 2,
            pix_fmt="yuv420p",
            time_base=time_base,
            gop_size=round(KEY_EVERY_S * rate),
            max_b_frames=0,  # B-frames shift the times of a file in pieces
        )

    def add(self, canvas: Image.Image, pts: int) -> None:
        frame = av.VideoFrame.from_image(canvas.crop((0, 0, self._stream.width, self._stream.height)))
        frame.pts, frame.time_base = pts, self._stream.codec_context.time_base
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        with writing(Path(self._file.name)):
            if self._stream.codec_context.is_open:  # else no frame of this size could be, and av 19 would crash
                self._file.mux(self._stream.encode(None))
            self._file.close()


def _reason(error: Exception) -> str:
    """In few words, without the address, which may hold a password."""
    return f"no answer for {TIMEOUT_S:g} s" if isinstance(error, av.error.ExitError) else getattr(error, "strerror", "")


def _line(frame: Frame, found: NamedDetections, time_base: Fraction) -> str:
    line = {
        "frame": frame.number,
        "time": round(float(frame.pts * time_base), 6),
        "boxes": [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in found.boxes.tolist()],
        "classes": found.names,
        "scores": found.scores.tolist(),
    }
    return json.dumps(line) + "\n"


def detect_in_video(
    file: PictureFile,
    to: Path,
    look: Callable[[Sequence[Decoded]], list[NamedDetections]],
    draw: Callable[[Decoded, NamedDetections], Image.Image] | None,
    *,
    batch_size: int,
    every: int,
    stop: StopSignal,
) -> dict[str, Any] | str:
    """Write `to`.jsonl, a line a frame, and with `draw` `to`.mp4, until the end or a signal.

    Returns what images.json says of the video; or why nothing of it can be read, and then nothing is written. Raises
    HdovdError if a file cannot be written.
    """
    url = file.url or ""
    try:
        container = av.open(
            url.replace("camera:", "/dev/video") or os.path.abspath(file.path),
            format="v4l2" if url.startswith("camera:") else None,
            # A file may name no addresses.
            options={"rtsp_transport": "tcp"} if url else {"protocol_whitelist": "file"},
            timeout=TIMEOUT_S if url else None,
        )
    except (av.error.FFmpegError, ValueError) as error:
        return _reason(error)
    lines = movie = last = None
    with container, ThreadPoolExecutor(1) as threads, ExitStack() as files:
        if not container.streams.video:
            return "there is no video in it"
        reader = _Reader(container, 2 * batch_size, every, live=bool(url) and container.duration is None)
        files.callback(reader.queue.end)
        reading, time_base = threads.submit(reader.run), reader.stream.time_base
        bar = files.enter_context(progress(None, "detect", "frame", total=reader.stream.frames // every or None))
        while frames := reader.queue.take(batch_size, stop):
            pictures, last = [frame.picture for frame in frames], frames[-1]
            found = look(pictures)
            with writing(to):
                to.parent.mkdir(parents=True, exist_ok=True)
                lines = lines or files.enter_context(to.with_name(f"{to.name}.jsonl").open("w", buffering=1))
                lines.writelines(_line(*both, time_base) for both in zip(frames, found, strict=True))
                for frame, canvas in zip(frames, map(draw, pictures, found) if draw else (), strict=False):
                    movie = movie or files.enter_context(closing(_Movie(to, canvas, reader.rate, time_base)))
                    movie.add(canvas, frame.pts)
            bar.update(len(frames))
    reading.result()
    reason = "stopped" if stop.received else reader.reason
    if last is None:
        return f"no frames: {reason or 'it is empty'}"
    notes = {
        f"frames dropped, which came faster than they were looked at: {reader.queue.dropped:,d}": reader.queue.dropped,
        f"damaged packets passed over: {reader.damaged:,d}": reader.damaged,
        f"frames of another size than the first, scaled to it: {reader.resized:,d}": reader.resized,
        f"ended after {counted(reader.frames, 'frame')}: {reason}": reason,
    }
    return {
        "width": last.picture.width,
        "height": last.picture.height,
        "frames": bar.n,
        "seconds": round(float(last.pts * time_base), 6),
        "lines": f"{to.parent.name}/{to.name}.jsonl",
        **({"drawn": f"{to.parent.name}/{to.name}.mp4"} if movie else {}),
        "notes": [note for note, told in notes.items() if told],
    }
