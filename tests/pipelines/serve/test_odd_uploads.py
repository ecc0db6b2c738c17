"""A real server, twenty clients at once, and hundreds of uploads that are no pictures, or strange ones: it goes on,
says what was wrong, and keeps nothing.
"""

from __future__ import annotations

import gc
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

KEPT_MB = 6  # of the last hundred; if all were kept that they send, it would be some 7 MB more
BALLAST = bytes(150_000)  # after a picture's end

NAMES = ("a.png", "../../etc/passwd", "a" * 300, 'q"uote.jpg', "\u2028.jpg", "CON", "x.py")
TYPES = (
    b"multipart/form-data",
    b"multipart/form-data; boundary=x",
    b"multipart/form-data; charset=none; boundary=\xff",
    b"text/plain",
    b"application/x-www-form-urlencoded",
)
FIELDS = {
    "names": (*[""] * 9, "tree, star", ",,,\n", "\x00", "a" * 250, "%s{}", "<b>"),
    "mix": (*[""] * 9, "nan", "1e999", "x", "0.5"),
    "box": (*[""] * 9, "0,0,5,5", "-1,0,2,2", "a,b", "1e308,1,1e308,1"),
    "count": (*[""] * 9, "-5", "1e9", "1" * 5_000, "3"),
}


PACKED = zlib.compress(bytes(40_000_000))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _bomb(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _text_bomb(png: bytes) -> bytes:
    """A PNG with a text that unpacks to 40 MB."""
    return png[:33] + _chunk(b"zTXt", b"a\0\0" + PACKED) + _chunk(b"iCCP", b"a\0\0" + PACKED) + png[33:]


def _uploads(png: Callable[..., bytes], count: int, seed: int) -> Iterator[dict[str, object]]:
    """What `httpx.post` sends."""
    rng = random.Random(seed)
    good = png(), png(90, 70, "JPEG"), png(33, 200, "WEBP"), png(50, 50, "GIF"), png(60, 40, "TIFF")
    for number in range(count):
        one, kind = rng.choice(good), number % 10
        noise = bytes(rng.randrange(256) for _ in range(rng.randrange(2_000)))
        damaged = bytearray(one)
        for _ in range(8):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        data = (
            one + BALLAST,
            noise + BALLAST,
            one[: rng.randrange(len(one))],
            bytes(damaged) + BALLAST,
            one[:20] + noise,
            b"",
            _bomb(rng.choice((100_000, 2**31 - 1, 0, 900)), rng.choice((100_000, 1, 900))),
            _text_bomb(png()),
            png(1, rng.choice((1, 20_000)), "PNG"),
            noise + one + BALLAST,
        )[kind]
        if number % 17 == 0:
            yield {"content": noise, "headers": {"content-type": rng.choice(TYPES)}}
        elif number % 17 == 1:
            yield {"files": {rng.choice(("pictures", "example:", "example:a", "")): (rng.choice(NAMES), data)}}
        else:
            fields = {name: rng.choice(values) for name, values in FIELDS.items()}
            yield {"files": {"picture": (rng.choice(NAMES), data)}, "data": fields}


def _resident_mb() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def test_odd_uploads(served: str, png: Callable[..., bytes]) -> None:
    codes, client = list[int](), httpx.Client(timeout=120)

    def ask(number: int, upload: dict[str, object]) -> int:
        answer = client.post(f"{served}/{('detect', 'search')[number % 2]}", **upload)  # type: ignore[arg-type]
        assert answer.status_code != 500, (upload, answer.text)
        assert answer.status_code == 200 or set(answer.json()) == {"error"}
        assert "Traceback" not in answer.text
        assert "/work" not in answer.text
        return answer.status_code

    resident = list[float]()
    for seed in range(3):
        with ThreadPoolExecutor(20) as threads:
            found = [threads.submit(ask, *pair) for pair in enumerate(_uploads(png, 100, seed))]
        codes += [one.result() for one in found]
        resident.append(_resident_mb())
    assert set(codes) <= {200, 400, 413, 422, 503}
    assert min(codes.count(code) for code in (200, 400, 422)) > 5
    assert resident[2] - resident[1] < KEPT_MB, resident
    answer = client.post(f"{served}/detect", files={"picture": png()})
    assert (answer.status_code, answer.json()["width"]) == (200, 40)
    client.close()


def test_clients_that_go_away(served: str, png: Callable[..., bytes], caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of what they send, or before the answer: the next one is answered, and nothing is logged."""
    import socket
    from urllib.parse import urlsplit

    place = urlsplit(served)
    body = b'--b\r\nContent-Disposition: form-data; name="picture"; filename="x"\r\n\r\n' + png() + b"\r\n--b--\r\n"
    head = f"POST /detect HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    whole = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    for sent in (whole[: len(whole) // 2], whole, head.encode()[:30], b"\x16\x03\x01 no http\r\n\r\n"):
        with socket.create_connection((place.hostname, place.port)) as line:
            line.sendall(sent)
    assert httpx.post(f"{served}/detect", files={"picture": png()}, timeout=60).status_code == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
