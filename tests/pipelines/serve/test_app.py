"""What is answered and what is refused."""

from __future__ import annotations

import io
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from hdovd.core import lines_to
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.search.config import BoxSource, SearchConfig
from hdovd.pipelines.search.search import search
from hdovd.pipelines.serve.config import ServeConfig
from hdovd.pipelines.serve.serve import Site

HOME = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def picture(world: Path) -> Path:
    return sorted((world / "val2017").iterdir())[1]


def _boxes(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(one["name"], one["novel"], one["score"], tuple(one["box"])) for one in answer["detections"]]


def _expected(detector: Detector, picture: Path) -> list[tuple[Any, ...]]:
    found, novel = detector(picture, detector.recipe.inference.score_threshold), detector.is_novel.tolist()
    rows = zip(found.names, found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [(name, novel[label], score, tuple(box)) for name, label, score, box in rows]


# --- answers ---


def test_detections_are_those_of_the_detector(client: TestClient, distilled: RunFolder, picture: Path) -> None:
    detector, protocol = Detector.from_run(distilled.path, device="cpu"), distilled.protocol()
    names = [protocol.novel[0], protocol.base[1].upper(), "purple  thing"]
    for asked, alone, said in (
        (list(protocol.names), False, ""),
        (names, False, f"{names[0]},\r\n {names[1]}\n{names[2]}, {names[0]}"),
        (names[:2], False, "\n".join(names[:2])),
        (names[:2], True, ",".join(names[:2])),
    ):
        fields = {"names": said} | ({"alone": "1"} if alone else {})
        for _ in range(2):
            answer = client.post("/detect", data=fields, files={"picture": picture.read_bytes()})
            assert answer.status_code == 200, answer.text
            expected = _expected(detector.set_classes(asked, alone=alone), picture)
            assert _boxes(answer.json()) == expected
            assert len(expected) > 5
        with Image.open(picture) as opened:
            assert (answer.json()["width"], answer.json()["height"]) == opened.size


def test_examples_are_those_of_the_detector(client: TestClient, distilled: RunFolder, picture: Path) -> None:
    crops = list[bytes]()
    for box in ((2, 3, 40, 50), (10, 20, 60, 64)):
        file = io.BytesIO()
        with Image.open(picture) as opened:
            opened.crop(box).save(file, "PNG")
        crops.append(file.getvalue())
    detector = Detector.from_run(distilled.path, device="cpu")
    base = distilled.protocol().base[0]
    for mix, name in ((1.0, "part-17"), (0.5, 'a 19" &/ü')):
        detector.set_examples({name: crops, "other": crops[:1]}, names=[base], mix=mix)
        files = [("picture", picture.read_bytes())]
        quoted = {"part-17": "part-17", 'a 19" &/ü': "a%2019%22%20%26%2F%C3%BC"}[name]
        files += [(f"example:{quoted}", crop) for crop in crops] + [("example:other", crops[0])]
        answer = client.post("/detect", data={"names": base, "mix": str(mix)}, files=files)
        assert answer.status_code == 200, answer.text
        assert answer.json()["names"] == [name, "other", base]
        assert _boxes(answer.json()) == _expected(detector, picture)
    assert client.post("/detect", data={"mix": "2"}, files=files).json()["error"].startswith('"mix" 2: expected')


def test_hits_are_those_of_a_search(client: TestClient, cache: Path, kept: list[int], picture: Path) -> None:
    one = f"{kept[1]}:1"
    asked: list[tuple[dict[str, str], bool, dict[str, Any]]] = [
        (
            {"words": "tree, red=2", "unlike": "fish=0.5", "count": "7"},
            False,
            {"queries": ("tree", "red=2"), "not_": ("fish=0.5",), "count": 7},
        ),
        ({"like": one, "source": "proposal"}, False, {"like": (one,), "source": BoxSource.PROPOSAL}),
        ({"box": "3,4,20,30"}, True, {"image": (str(picture),), "box": (3.0, 4.0, 20.0, 30.0)}),
        ({"words": "tree"}, True, {"image": (str(picture),), "queries": ("tree",)}),
    ]
    for fields, with_picture, config in asked:
        files = {"picture": picture.read_bytes()} if with_picture else None
        hits = client.post("/search", data=fields, files=files).json()["hits"]
        crops = [hit.pop("crop") for hit in hits]
        expected = search(SearchConfig(cache=cache, device="cpu", **config))
        assert [(hit["image_id"], hit["row"], hit["cosine"]) for hit in hits] == [
            (hit.image_id, hit.row, pytest.approx(hit.cosine, abs=1e-6)) for hit in expected
        ]
        assert set(hits[0]) == set(asdict(expected[0]))
        assert all(crop.startswith("data:image/jpeg;base64,") for crop in crops)


def test_clip_is_loaded_once(distilled: RunFolder, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hdovd.pipelines.search import search

    loads, load = list[str](), search.load_same_clip
    monkeypatch.setattr(search, "load_same_clip", lambda name, *a, **k: (loads.append(name), load(name, *a, **k))[1])
    client = TestClient(Site(ServeConfig(cache=cache, device="cpu")).app, HOME)
    for words in ("tree", "fish", "a"):
        assert client.post("/search", data={"words": words}).status_code == 200
    assert len(loads) == 1


def test_a_run_or_a_cache_alone(distilled: RunFolder, cache: Path, picture: Path) -> None:
    files = {"picture": picture.read_bytes()}
    run = TestClient(Site(ServeConfig(run=distilled.path, device="cpu")).app, HOME)
    assert (run.post("/detect", files=files).status_code, run.post("/search", files=files).status_code) == (200, 404)
    assert 'id="find"' in run.get("/").text
    assert 'id="ask"' not in run.get("/").text
    alone = TestClient(Site(ServeConfig(cache=cache, device="cpu")).app, HOME)
    assert (alone.post("/detect", files=files).status_code, alone.post("/search", files=files).status_code) == (
        404,
        200,
    )
    assert 'id="find"' not in alone.get("/").text


# --- what is wrong with a question ---


def test_what_is_no_picture_is_said_and_no_more(client: TestClient, png: Callable[..., bytes]) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    huge = b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    huge += (100_000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24)
    for data, why in (
        (b"no picture", "the picture: no picture of a kind that Pillow reads"),
        (b"", "the picture: no picture of a kind that Pillow reads"),
        (png()[:60], "the picture: "),
        (eps, "the picture is EPS, expected one of JPEG"),
        (huge, "the picture has 100000x100000 pixels"),
        (
            png(1001, 1000),
            "the picture has 1001x1000 pixels, more than the 1 million that are taken here: make it smaller",
        ),
    ):
        for path in ("/detect", "/search"):
            answer = client.post(path, files={"picture": ("/etc/passwd", data)})
            assert answer.status_code == 422
            assert answer.json()["error"].startswith(why)
            assert "passwd" not in answer.text
    assert client.post("/detect", files={"picture": png(), "example:a": b"none"}).status_code == 422
    assert client.post("/detect", files={"picture": png(1000, 1000)}).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "why"),
    [
        ("/detect", {}, "no picture was sent"),
        ("/detect", {"picture": "text"}, "no picture was sent"),
        ("/detect", {"names": "a\0b", "picture": "x"}, "names"),
        ("/search", {}, "nothing to search for: say words"),
        ("/search", {"words": "tree", "count": "many"}, "count: 'many' is not what was expected: int"),
        ("/search", {"words": "tree", "source": "?"}, "source: '?' is not"),
        ("/search", {"words": "tree", "box": "1,2"}, '"box" 1,2: expected x,y,w,h'),
        ("/search", {"words": "tree", "box": "1,2,3,4"}, '"box" is a box of "picture": give one "picture" with it'),
        ("/search", {"like": "7"}, '"like" 7: expected IMAGE_ID:ROW'),
        ("/search", {"like": "1:999999"}, '"like" 1:999999: there is no such row'),
        ("/search", {"words": "tree=-1"}, "tree=-1: a weight is a number above 0, such as tree=0.5; what it is to be"),
        ("/search", {"words": "--clip, --box", "unlike": "--clip, --box"}, "the parts of the query add up to nothing"),
        ("/search", {"words": "tree", "unlike": "tree"}, "the parts of the query add up to nothing"),
    ],
)
def test_fields_that_do_not_fit(client: TestClient, path: str, fields: dict[str, str], why: str) -> None:
    answer = client.post(path, data=fields)
    assert (answer.status_code, answer.json()["error"][: len(why)]) == (422, why)


def test_errors_of_commands_speak_of_fields(
    client: TestClient, extraction: Callable[..., ExtractConfig], clip: str, tmp_path: Path, png: Callable[..., bytes]
) -> None:
    """Or of how the server was started, or of another command; of no option alone."""
    shutil.copytree(clip.removeprefix("local-dir:"), tmp_path / "clip")
    extract_clip(extraction(tmp_path / "cache", clip=f"local-dir:{tmp_path / 'clip'}"))
    shutil.rmtree(tmp_path / "clip")
    without = TestClient(Site(ServeConfig(cache=tmp_path / "cache", device="cpu")).app, HOME)
    crops = {"picture": png(), "example:cat": png(), "example:Cat": png()}
    errors = [
        client.post("/detect", files=crops).json()["error"],
        client.post("/search", data={"box": "0,0,99,99"}, files={"picture": png()}).json()["error"],
        without.post("/search", data={"words": "tree"}).json()["error"],
    ]
    assert errors[0] == '"example": named twice: Cat, cat; each class once, in capitals or not'
    assert errors[1] == '"box" 0,0,99,99 is not within the picture, which is 40x30'
    assert "If it lies elsewhere now, say where: hdovd serve --clip, hdovd serve --pretrained" in errors[2]
    assert not re.search(r"(?<!hdovd )(?<!serve )--", "".join(errors))


def test_a_box_beside_the_picture(client: TestClient, png: Callable[..., bytes]) -> None:
    for box in ("0,0,41,10", "nan,0,1,1", "0,0,inf,1", "5,5,0,1"):
        answer = client.post("/search", data={"box": box}, files={"picture": png()})
        assert answer.status_code == 422
        assert "is not within the picture, which is 40x30" in answer.json()["error"]


def test_no_path_is_told(
    distilled: RunFolder, copied_cache: Path, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the cache, nor of a CLIP that is not there any more, nor in an error that is ours."""
    lines, config = list[str](), ServeConfig(run=distilled.path, cache=copied_cache, device="cpu")
    client = TestClient(Site(config).app, HOME, raise_server_exceptions=False)
    monkeypatch.setattr("hdovd.pipelines.teachers.openclip.load_clip", _no_clip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with lines_to(lines.append):
        answers = [
            client.post("/search", data={"like": "99999:0"}),
            client.post("/search", data={"words": "tree"}),
            client.post("/detect", data={"names": "never named"}, files={"picture": picture.read_bytes()}),
        ]
    for answer in answers:
        assert answer.status_code == 422
        assert "/" not in answer.json()["error"].replace("(a place on the server)", "")
        assert "a place on the server" in answer.text
    assert any(str(copied_cache) in line for line in lines)  # who runs it sees all
    assert "hdovd serve --clip" in answers[2].json()["error"]
    for answer in answers:
        assert not re.search(r"(?<!hdovd )(?<!serve )(?<!search )(?<!detect )--", answer.json()["error"])
    of_run = client.post(
        "/detect", data={"names": distilled.protocol().novel[0]}, files={"picture": picture.read_bytes()}
    )
    assert of_run.status_code == 200  # needs no CLIP
    monkeypatch.setattr("hdovd.pipelines.serve.serve.decode", lambda _: 1 / 0)
    failed = client.post("/detect", files={"picture": picture.read_bytes()})
    assert (failed.status_code, failed.text) == (500, "Internal Server Error")


def test_folders_with_spaces_are_not_told_either(copied_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(copied_cache, tmp_path / "my secret stuff" / "cache")
    client = TestClient(Site(ServeConfig(cache=cache, device="cpu")).app, HOME, raise_server_exceptions=False)
    answer = client.post("/search", data={"like": "99999:0"})
    assert answer.status_code == 422
    assert "secret" not in answer.text


def test_a_text_in_place_of_an_example_is_told(client: TestClient, png: Callable[..., bytes]) -> None:
    answer = client.post("/detect", data={"example:x": "hello"}, files={"picture": png()})
    assert (answer.status_code, answer.json()["error"]) == (422, "example:x: expected a picture, found text")


def _no_clip(name: str, *_: Any, **__: Any) -> None:
    from hdovd.core import HdovdError

    raise HdovdError(f"{name}: no such folder /home/someone/clip")


# --- limits ---


def test_more_bytes_than_are_taken(client: TestClient) -> None:
    """Counted as they come: a length need not be told, nor be true."""
    body = b"--b\r\nContent-Disposition: form-data; name=picture; filename=x\r\n\r\n"
    taken = list[int]()

    def pieces(count: int) -> Any:
        yield body
        for number in range(count):
            taken.append(number)
            yield bytes(10_000)
        yield b"\r\n--b--\r\n"

    of_form = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/detect", content=pieces(19), headers=of_form).status_code == 422
    answer = client.post("/detect", content=pieces(21), headers=of_form)
    assert (answer.status_code, answer.json()["error"][:27]) == (413, "more than 0.2 MB at once: s")
    assert client.post("/detect", content=pieces(21), headers=of_form | {"content-length": "7"}).status_code == 413


def test_too_many_fields_and_too_long_ones(client: TestClient, png: Callable[..., bytes]) -> None:
    assert (
        client.post("/search", data={f"a{number}": "" for number in range(65)}, files={"x": png()}).status_code == 400
    )
    assert (
        client.post("/detect", files=[("picture", png()), *[(f"example:{k}", png()) for k in range(64)]]).status_code
        == 400
    )
    assert client.post("/search", data={"words": "a" * 17_000}, files={"picture": png()}).status_code == 400


def test_one_is_answered_at_a_time(site: Site, served: str) -> None:
    import httpx

    go = threading.Event()
    site.pool.submit(go.wait, 60)
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(httpx.post, f"{served}/search", data={"words": "tree"}, timeout=60) for _ in range(4)]
        time.sleep(0.5)
        assert not any(answer.done() for answer in asked)
        go.set()
    assert [answer.result().status_code for answer in asked] == [200] * 4


# --- who may ask ---


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8765", "", "[::1", "10.0.0.1"]
)
def test_names_of_others_are_refused(client: TestClient, host: str) -> None:
    for answer in (client.get("/", headers={"host": host}), client.post("/search", headers={"host": host})):
        assert answer.status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost", "LOCALHOST:1", "[::1]:8765", "127.1.2.3"])
def test_names_of_this_machine_are_not(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


def test_an_open_server_is_reached_by_number_and_name(cache: Path) -> None:
    from socket import gethostname

    client = TestClient(Site(ServeConfig(cache=cache, device="cpu", host="0.0.0.0")).app, HOME)
    for host, code in (
        ("10.0.0.1:8765", 200),
        ("[fe80::1]", 200),
        (gethostname(), 200),
        ("evil.example", 403),
        ("cafe", 403),
    ):
        assert client.get("/", headers={"host": host}).status_code == code, host


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_sites_are_refused(client: TestClient, headers: dict[str, str], kept: list[int]) -> None:
    for answer in (
        client.post("/search", data={"words": "tree"}, headers=headers),
        client.post("/detect", headers=headers),
        client.get(f"/picture/{kept[0]}", headers=headers),
    ):
        assert (answer.status_code, answer.json()["error"]) == (403, "asked by another site")
    assert client.get("/", headers=headers).status_code == 200  # a link to the page


def test_this_site_is_not(client: TestClient) -> None:
    own = {"origin": HOME, "sec-fetch-site": "same-origin"}
    assert client.post("/search", data={"words": "tree"}, headers=own).status_code == 200


def test_pictures_are_those_of_the_cache(client: TestClient, kept: list[int]) -> None:
    answer = client.get(f"/picture/{kept[0]}")
    assert answer.json()["picture"].startswith("data:image/jpeg;base64,")
    assert client.get("/picture/99999").json()["error"] == "the cache has no image 99999"
    for path in (
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "/etc/passwd",
        "1/../../x",
        "-1",
        "x",
        "",
    ):
        assert client.get(f"/picture/{path}").status_code in (404, 422), path
    for path in ("/serve.html", "/pages/serve.html", "/static/x", "//etc/passwd", "/openapi.json", "/.git/config"):
        assert client.get(path).status_code == 404, path


def test_headers(client: TestClient) -> None:
    first, second = client.get("/"), client.get("/")
    policy = first.headers["content-security-policy"]
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert f'<script nonce="{nonce}">' in first.text
    assert nonce not in second.text
    for part in (
        "default-src 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "connect-src 'self'",
    ):
        assert part in policy
    assert "unsafe" not in policy
    for answer in (
        first,
        client.get("/none"),
        client.post("/search"),
        client.get("/", headers={"host": "evil.example"}),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
