"""The web server of `hdovd serve`."""

import socket

from hdovd.core.errors import HdovdError, system_reason
from hdovd.core.log import log
from hdovd.pipelines.serve.config import ServeConfig

MOST_CONNECTIONS = 64
STOP_S = 5  # for answers that are being made when it is stopped


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C. Raises HdovdError for bad input, and an address that cannot be had."""
    config.check()
    try:
        import uvicorn

        from hdovd.pipelines.serve.app import Site, is_local
    except ImportError as error:
        raise HdovdError(f'hdovd serve needs a web server: pip install "hdovd[serve]" ({error})') from error
    kind, shown = (socket.AF_INET6, f"[{config.host}]") if ":" in config.host else (socket.AF_INET, config.host)
    try:
        listener = socket.create_server((config.host, config.port), family=kind)
    except OSError as error:
        why = system_reason(error).partition(" (while")[0]
        raise HdovdError(
            f"cannot listen at {config.host}, port {config.port} ({why}): give another --port (0: one "
            "that is free), or --host"
        ) from error
    settings = uvicorn.Config(
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
    if not is_local(config.host):
        log(f"note: --host {config.host}: anyone who reaches this machine can use it; there is no password")
    log(f"serving http://{shown}:{listener.getsockname()[1]} (Ctrl+C stops)")
    uvicorn.Server(settings).run(sockets=[listener])
