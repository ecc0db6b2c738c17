"""The web server of `hdovd serve`, its page, and the questions that the page asks: what is refused, and one answer at a
time: detections, hits, and pictures of the cache.

A question is a form: `texts` and `files`, of each field the values that were sent, whoever sent them. Files are
pictures that `fitting` let pass. One thread asks.
"""

import asyncio
import io
import re
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hdovd.core import HdovdError, log, system_reason
from hdovd.core.picture_header import open_picture, told
from hdovd.core.text_files import checked_name
from hdovd.data import DataPaths
from hdovd.pipelines.common.images import decode
from hdovd.pipelines.common.options import DATA
from hdovd.pipelines.common.pages import page, small_picture_data
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.runs import DEFAULT_MIX
from hdovd.pipelines.search.config import BoxSource, SearchConfig, parse_box
from hdovd.pipelines.search.search import PICTURE_SIDE, Searched, crop_of, found, opened
from hdovd.pipelines.serve.config import ServeConfig
from hdovd.pipelines.teachers.base import folded

try:
    import uvicorn
    from python_multipart.exceptions import FormParserError  # of what Starlette reads forms with
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import Message
except ImportError as error:
    raise HdovdError(f'hdovd serve needs a web server: pip install "hdovd[serve]" ({error})') from error

KINDS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # for one of the others Pillow starts a program
MOST_HITS = 100
PICTURE = "the picture"  # what an upload is called, whatever its sender calls it
EXAMPLE = "example:"  # begins the fields of examples; what follows is the class, percent-encoded
Texts = Mapping[str, Sequence[str]]
Files = Mapping[str, Sequence[bytes]]
Answer = dict[str, Any]


class Finding:
    """What a run's detector finds. What it was asked for last is not embedded again."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._asked: object = None

    def answer(self, texts: Texts, files: Files) -> Answer:
        """What is in `picture`: of `names`, of the classes of examples, or if there are neither of the run's classes;
        mix, alone: as of `Detector.set_examples`. Raises HdovdError.
        """
        detector, names, alone = self._detector, listed(texts, "names"), bool(texts.get("alone"))
        shown = {unquote(name[len(EXAMPLE) :]): crops for name, crops in files.items() if name.startswith(EXAMPLE)}
        if "picture" not in files:
            raise HdovdError("no picture was sent")
        if strange := [name for name in texts if name.startswith(EXAMPLE)]:
            raise HdovdError(f"{strange[0]}: expected a picture, found text")
        if (asked := (names, shown, mix := one(texts, "mix", float, DEFAULT_MIX), alone)) != self._asked:
            if shown:
                detector.set_examples(shown, names=names, mix=mix, alone=alone)
            else:
                detector.set_classes(names or detector.protocol.names, alone=alone)
            self._asked = asked
        picture, novel = decode(files["picture"][0]), detector.is_novel.tolist()
        best = detector.find([picture], detector.recipe.inference.score_threshold)[0]
        rows = zip(best.names, best.labels.tolist(), best.scores.tolist(), best.boxes.tolist(), strict=True)
        return {
            "width": picture.width,
            "height": picture.height,
            "names": detector.names,
            "detections": [
                {"name": name, "novel": novel[label], "score": score, "box": box} for name, label, score, box in rows
            ],
        }


def hits(config: SearchConfig, searched: Searched, texts: Texts, files: Files) -> Answer:
    """The hits for the parts of a query, and their crops, null for one that cannot be read: words, unlike, like, and
    `picture` or a `box` of it; source, count. Raises HdovdError.
    """
    pictures = {PICTURE: files["picture"][0]} if "picture" in files else {}
    if not pictures and not any("".join(texts.get(name, ())).strip() for name in ("words", "unlike", "like")):
        raise HdovdError("nothing to search for: say words, or draw a box on a picture")
    asked = replace(
        config,
        queries=tuple(listed(texts, "words")),
        not_=tuple(listed(texts, "unlike")),
        like=tuple(listed(texts, "like")),
        image=tuple(pictures),
        box=one(texts, "box", parse_box, None),
        source=one(texts, "source", BoxSource, None),
        count=max(1, min(one(texts, "count", int, 20), MOST_HITS)),
    )
    answers = []
    for hit in found(asked, searched, pictures):
        crop = None
        with suppress(HdovdError):
            crop = crop_of(searched.picture(hit.image_id), hit)
        answers.append(asdict(hit) | {"crop": crop})
    return {"hits": answers}


def shown_picture(searched: Searched, image_id: int) -> Answer:
    """A picture of the cache, as a data: address. Raises HdovdError."""
    picture = searched.picture(image_id)
    return {"picture": small_picture_data(picture, PICTURE_SIDE), "width": picture.width, "height": picture.height}


def fitting(data: bytes, max_megapixels: float) -> bytes:
    """The same. Raises HdovdError for what is no picture, or larger than is decoded; nothing is decoded here."""
    with told(PICTURE), open_picture(io.BytesIO(data)) as file:
        if file.format not in KINDS:
            raise HdovdError(f"is {file.format}, expected one of {', '.join(KINDS)}")
        if file.width * file.height > 1e6 * max_megapixels:
            raise HdovdError(
                f"has {file.width}x{file.height} pixels, more than the {max_megapixels:g} million that are taken here: "
                f"make it smaller"
            )
    return data


def one(texts: Texts, name: str, kind: Callable[[str], Any], default: Any) -> Any:
    """A field's value, or the default if it is empty. Raises HdovdError."""
    try:
        return kind(texts[name][0]) if "".join(texts.get(name, ())) else default
    except ValueError:
        raise HdovdError(f"{name}: {texts[name][0]!r} is not what was expected: {kind.__name__}") from None


def listed(texts: Texts, name: str) -> list[str]:
    """A field's names or words, with commas or lines between them, each once. Raises HdovdError for what cannot be
    printed.
    """
    parts = [" ".join(part.split()) for text in texts.get(name, ()) for part in re.split(r"[,\r\n]", text)]
    return [*{folded(part): checked_name(part, name) for part in parts if part}.values()]


POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; script-src 'nonce-{0}'; "
    "style-src 'nonce-{0}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOCAL = r"localhost|127(\.\d+){3}|::1|\[::1\]"
NUMBERS = r"[\d.]+|\[[\da-f:.]+\]"  # addresses that no DNS is asked for
is_local = re.compile(LOCAL).fullmatch  # whether this machine alone reaches a host
MOST_FIELDS, MOST_TEXT = 64, 16_384  # characters of a field, which are some thousand names
SOMEWHERE = "(a place on the server)"
# Options that errors speak of, but beside a command; and what they are here: fields, or how the server was started.
OPTION = re.compile(r"(hdovd [a-z -]*)?(?<![\w'\"-])--([a-z][a-z-]*)")
WORDS = {name: f"hdovd serve --{name}" for name in (*ServeConfig.__dataclass_fields__, *DATA)} | {
    option: f'"{field}"'
    for option, field in zip(
        ("box", "image", "like", "not", "mix", "examples"),
        ("box", "picture", "like", "unlike", "mix", "example"),
        strict=True,
    )
}
PATH = re.compile(r"'[^'\n]*/[^'\n]*'|\S*/\S*")


class Site:
    """Page and answers, which are found one after another, in the one thread of `pool`."""

    def __init__(self, config: ServeConfig) -> None:
        """Loads what is served. Raises HdovdError."""
        self.config, self.pool = config, ThreadPoolExecutor(1)
        others = "" if is_local(config.host) else f"|{NUMBERS}|{re.escape(socket.gethostname())}"
        self.own = re.compile(rf"({LOCAL}|\[?{re.escape(config.host)}\]?{others})(:\d+)?", re.IGNORECASE)
        routes = [Route("/", self.page)]
        clip: dict[str, Any] = {"clip": config.clip, "pretrained": config.pretrained, "device": config.device}
        if config.run is not None:
            find = Finding(Detector.from_run(config.run, trust=config.trust, **clip)).answer
            routes.append(Route("/detect", partial(self.answered, find), methods=["POST"]))
        if config.cache is not None:
            asked = SearchConfig(cache=config.cache, features=config.features, data=config.data, queries=("-",), **clip)
            searched = opened(asked, pictures=True)
            routes += [
                Route("/search", partial(self.answered, partial(hits, asked, searched)), methods=["POST"]),
                Route("/picture/{image_id:int}", partial(self.pictured, partial(shown_picture, searched))),
            ]
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=self.guarded)],
            exception_handlers=dict.fromkeys((HTTPException, HdovdError, ClientDisconnect, FormParserError), self.told),
        )
        given = [path for path in (config.run, config.cache, *astuple(config.data or DataPaths())) if path]
        known = {str(path) for path in given} | {str(Path(path).resolve()) for path in given}
        self.places = sorted((path for path in known if "/" in path), key=len, reverse=True)

    async def guarded(self, request: Request, answer: RequestResponseEndpoint) -> Response:
        """Refuses names that are not this host's, though another's DNS leads them here, and what other sites have a
        browser ask.
        """
        host, origin, site = (request.headers.get(name, "") for name in ("host", "origin", "sec-fetch-site"))
        own = site in ("", "same-origin", "none") and origin in ("", f"http://{host}", f"https://{host}")
        known, linked = self.own.fullmatch(host), (request.method, request.scope["path"]) == ("GET", "/")
        why = "asked by another site" if known else "use the address that hdovd serve printed"
        response = await answer(request) if known and (own or linked) else JSONResponse({"error": why}, 403)
        response.headers.update(HEADERS)
        return response

    async def page(self, _: Request) -> Response:
        nonce, config = secrets.token_urlsafe(16), self.config
        return HTMLResponse(
            page("serve.html", {"nonce": nonce, "mix": DEFAULT_MIX, "config": config}),
            headers={"Content-Security-Policy": POLICY.format(nonce)},
        )

    async def pictured(self, answer: Callable[[int], Answer], request: Request) -> Response:
        return await self.queued(partial(answer, request.path_params["image_id"]))

    async def answered(self, answer: Callable[[Texts, Files], Answer], request: Request) -> Response:
        left = 1e6 * self.config.max_mb

        async def limited() -> Message:
            nonlocal left
            message = await request.receive()
            if (left := left - len(message.get("body", b""))) < 0:
                raise HTTPException(413, f"more than {self.config.max_mb:g} MB at once: send less, or smaller pictures")
            return message

        def job() -> Answer:
            texts, files = dict[str, list[str]](), dict[str, list[bytes]]()
            for name, value in form.multi_items():
                if isinstance(value, str):
                    texts.setdefault(name, []).append(value)
                else:
                    files.setdefault(name, []).append(fitting(value.file.read(), self.config.max_megapixels))
            return answer(texts, files)

        asked = Request(request.scope, limited)
        async with asked.form(max_files=MOST_FIELDS, max_fields=MOST_FIELDS, max_part_size=MOST_TEXT) as form:
            return await self.queued(job)

    def told(self, request: Request, error: Exception) -> Response:
        """What was wrong with a question, for someone who gave no options and is to know no path of this machine."""
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        log(f"refused: {error}" if str(error) else "a client went away")
        command = "detect" if request.url.path == "/detect" else "search"
        text = OPTION.sub(lambda one: one[0] if one[1] else WORDS.get(one[2], f"hdovd {command} {one[0]}"), str(error))
        for place in self.places:
            text = text.replace(place, SOMEWHERE)
        return JSONResponse({"error": PATH.sub(SOMEWHERE, text)}, 422)

    async def queued(self, job: Callable[[], Answer]) -> Response:
        """The job's answer, after those of before it."""
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(self.pool, job))


MOST_CONNECTIONS = 64
STOP_S = 5  # for answers that are being made when it is stopped


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C. Raises HdovdError for bad input, and an address that cannot be had."""
    config.check()
    kind, shown = (socket.AF_INET6, f"[{config.host}]") if ":" in config.host else (socket.AF_INET, config.host)
    try:
        listener = socket.create_server((config.host, config.port), family=kind)
    except OSError as error:
        raise HdovdError(
            f"cannot listen at {config.host}, port {config.port} "
            f"({system_reason(error).partition(' (while')[0]}): give another --port (0: one that is free), or --host"
        ) from error
    server = uvicorn.Server(
        uvicorn.Config(
            Site(config).app,
            log_config=None,
            log_level="error",
            access_log=False,
            ws="none",
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=STOP_S,
        )
    )
    if not is_local(config.host):
        log(f"note: --host {config.host}: anyone who reaches this machine can use it; there is no password")
    log(f"serving http://{shown}:{listener.getsockname()[1]} (Ctrl+C stops)")
    server.run(sockets=[listener])
