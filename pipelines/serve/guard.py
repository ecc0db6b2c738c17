"""Who may ask `hdovd serve`: see docs/SERVE.md, "What is refused"."""

from ipaddress import ip_address
from socket import gethostname
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses what other sites have a browser ask, and names that are not this host's, though another's DNS leads them
    here; adds `HEADERS`.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._is_open = app, not is_loopback(host)
        self._names = {"localhost", host.lower(), *([gethostname().lower()] if self._is_open else [])}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Content-Security-Policy", "default-src 'none'")
            await send(message)

        why = self._refusal(scope) if scope["type"] == "http" else ""
        await (JSONResponse({"error": why}, 403) if why else self._app)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> str:
        """Why; empty if it is answered."""
        headers = Headers(scope=scope)
        host, origin, site = (headers.get(name, "") for name in ("host", "origin", "sec-fetch-site"))
        if not self._is_own(host):
            return "this is not the address that hdovd serve printed: use that one"
        own = site in ("", "same-origin", "none") and origin in ("", f"http://{host}", f"https://{host}")
        return "" if own or (scope["method"] == "GET" and scope["path"] == "/") else "asked by another site"

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or is_loopback(name) or (self._is_open and is_address(name))


def is_address(name: str) -> bool:
    """Whether it is a number that no DNS is asked for."""
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether it leads to this machine alone."""
    return host == "localhost" or (is_address(host) and ip_address(host).is_loopback)
