"""The page of `hdovd serve` and its questions, each within limits, and one at a time."""

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message

from hdovd.core.errors import HdovdError
from hdovd.core.version import __version__
from hdovd.pipelines.common.options import DEFAULT_MIX
from hdovd.pipelines.common.pages import page
from hdovd.pipelines.serve.answers import Answers, without_paths
from hdovd.pipelines.serve.config import ServeConfig
from hdovd.pipelines.serve.guard import Guard

POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; script-src 'nonce-{0}'; "
    "style-src 'nonce-{0}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PATIENCE_S = 60  # for what a browser sends
MOST_EXAMPLES = 64
Job = Callable[[], dict[str, Any]]


def app(answers: Answers, config: ServeConfig) -> Guard:
    """What a web server runs."""
    return Guard(_App(answers, config).starlette, config.host)


class _App:
    """`waiting`: questions that are answered or wait for it, in the one thread of `pool`."""

    def __init__(self, answers: Answers, config: ServeConfig) -> None:
        self.answers, self.config = answers, config
        self.pool, self.waiting = ThreadPoolExecutor(1), 0
        self.starlette = Starlette(
            routes=[
                Route("/", self.page),
                Route("/detect", self.detect, methods=["POST"]),
                Route("/search", self.search, methods=["POST"]),
                Route("/picture/{image_id:int}", self.picture),
            ],
            exception_handlers={HTTPException: _told, ClientDisconnect: _told, HdovdError: _told, Exception: _failed},
        )

    async def page(self, _: Request) -> Response:
        nonce, answers = secrets.token_urlsafe(16), self.answers
        context = {
            "nonce": nonce,
            "version": __version__,
            "finds": answers.detector is not None,
            "searches": answers.searched is not None,
            "mix": DEFAULT_MIX,
            "max_mb": self.config.max_mb,
        }
        return HTMLResponse(page("serve.html", context), headers={"Content-Security-Policy": POLICY.format(nonce)})

    async def detect(self, request: Request) -> Response:
        def job(form: FormData) -> dict[str, Any]:
            names, crops = form.getlist("example_name"), [_data(crop) for crop in form.getlist("example")]
            if len(names) != len(crops):
                raise HdovdError(f"{len(crops)} examples and {len(names)} names of them: expected as many")
            examples = [*zip(map(str, names), crops, strict=True)]
            mix, alone = _number(form, "mix", DEFAULT_MIX), "alone" in form
            return self.answers.detect(_data(form.get("picture")), _text(form, "names"), examples, mix, alone)

        return await self._answered(request, job)

    async def search(self, request: Request) -> Response:
        def job(form: FormData) -> dict[str, Any]:
            texts = {name: _text(form, name) for name in ("words", "unlike", "like", "box", "source")}
            picture = _data(form["picture"]) if "picture" in form else None
            return self.answers.search(**texts, picture=picture, count=int(_number(form, "count", 20)))

        return await self._answered(request, job)

    async def picture(self, request: Request) -> Response:
        return JSONResponse(await self._queued(lambda: self.answers.whole(request.path_params["image_id"])))

    async def _answered(self, request: Request, job: Callable[[FormData], dict[str, Any]]) -> Response:
        """The answer to a form, which is read up to the limits."""
        limited = Request(request.scope, self._limited(request))
        try:
            async with asyncio.timeout(PATIENCE_S):
                form = await limited.form(max_files=MOST_EXAMPLES + 1, max_fields=MOST_EXAMPLES + 16)
        except TimeoutError:
            raise HTTPException(408, f"what was sent took longer than {PATIENCE_S} seconds") from None
        try:
            return JSONResponse(await self._queued(lambda: job(form)))
        finally:
            await form.close()

    def _limited(self, request: Request) -> Callable[[], Any]:
        left = 1e6 * self.config.max_mb

        async def receive() -> Message:
            nonlocal left
            message = await request.receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"more than {self.config.max_mb:g} MB at once: send less, or smaller pictures")
            return message

        return receive

    async def _queued(self, job: Job) -> dict[str, Any]:
        if self.waiting > self.config.queue:
            raise HTTPException(503, "too many questions at once: ask again in some seconds", {"Retry-After": "3"})
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, job)
        finally:
            self.waiting -= 1


def _told(_: Request, error: Exception) -> Response:
    """What was wrong with a question."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    gone = isinstance(error, ClientDisconnect)  # nobody reads this then
    return JSONResponse({"error": "" if gone else without_paths(str(error))}, 422)


def _failed(_: Request, error: Exception) -> Response:
    """What is our fault; the server's user sees the traceback."""
    return JSONResponse({"error": "the server failed at this; whoever runs it sees why"}, 500)


def _data(value: UploadFile | str | None) -> bytes:
    if not isinstance(value, UploadFile):
        raise HdovdError("no picture was sent")
    return value.file.read()


def _text(form: FormData, name: str) -> str:
    return str(form.get(name, ""))


def _number(form: FormData, name: str, default: float) -> float:
    text = _text(form, name) or f"{default}"
    try:
        if isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise HdovdError(f"{name} {text!r}: expected a number")
