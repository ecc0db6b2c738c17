"""The web server of `hdovd serve`."""

import socket
from types import ModuleType

from hdovd.core.errors import HdovdError, system_reason
from hdovd.core.log import log
from hdovd.pipelines.serve.config import ServeConfig

MOST_CONNECTIONS = 64
STOP_S = 5  # for answers that are being made when it is stopped


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C. Raises HdovdError for bad input, and a port that is in use."""
    config.check()
    uvicorn = _server()
    with _listening(config.host, config.port) as listener:
        from hdovd.pipelines.serve.answers import Answers
        from hdovd.pipelines.serve.app import app
        from hdovd.pipelines.serve.guard import is_loopback

        settings = uvicorn.Config(
            app(Answers(config), config),
            log_config=None,
            log_level="error",
            access_log=False,
            ws="none",
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=STOP_S,
        )
        if not is_loopback(config.host):
            log(f"note: --host {config.host}: anyone who reaches this machine can use it; there is no password")
        shown = f"[{config.host}]" if ":" in config.host else config.host
        log(f"serving http://{shown}:{listener.getsockname()[1]} (Ctrl+C stops)")
        uvicorn.Server(settings).run(sockets=[listener])


def _server() -> ModuleType:
    try:
        import python_multipart  # noqa: F401  # what starlette reads forms with
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise HdovdError(f'hdovd serve needs a web server: pip install "hdovd[serve]" ({error})') from error
    return uvicorn


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise HdovdError(
            f"cannot listen at {host}, port {port} ({system_reason(error)}): give another --port (0: one that is "
            "free), or --host"
        ) from error
