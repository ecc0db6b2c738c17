"""The page of `hdovd serve` and the questions that it asks: what is refused, and one answer at a time."""

import asyncio
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Any

from python_multipart.exceptions import FormParserError  # of what Starlette reads forms with
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message

from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.data.coco import DataPaths
from hdovd.pipelines.common.options import DATA
from hdovd.pipelines.common.pages import page
from hdovd.pipelines.runs.config import DEFAULT_MIX
from hdovd.pipelines.serve.answers import Files, Finding, Searching, Texts, fitting
from hdovd.pipelines.serve.config import ServeConfig

Answer = dict[str, Any]
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
        others = "" if is_local(config.host) else f"|{NUMBERS}|{re.escape(gethostname())}"
        self.own = re.compile(rf"({LOCAL}|\[?{re.escape(config.host)}\]?{others})(:\d+)?", re.IGNORECASE)
        routes = [Route("/", self.page)]
        if config.run is not None:
            routes.append(Route("/detect", partial(self.answered, Finding(config).answer), methods=["POST"]))
        if config.cache is not None:
            searching = Searching(config)
            routes += [
                Route("/search", partial(self.answered, searching.answer), methods=["POST"]),
                Route("/picture/{image_id:int}", partial(self.pictured, searching.picture)),
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
        context = {"nonce": nonce, "mix": DEFAULT_MIX, "config": config}
        return HTMLResponse(page("serve.html", context), headers={"Content-Security-Policy": POLICY.format(nonce)})

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
