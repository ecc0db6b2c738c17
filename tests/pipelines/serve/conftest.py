"""A run and a cache that are served, in this process and by a real server."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("uvicorn")
import uvicorn
from starlette.testclient import TestClient

from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.serve.config import ServeConfig
from hdovd.pipelines.serve.serve import Site


@pytest.fixture(scope="session")
def site(distilled: RunFolder, cache: Path) -> Site:
    """A run and a cache; 0.2 MB at once, and pictures of 1 million pixels."""
    return Site(ServeConfig(run=distilled.path, cache=cache, device="cpu", max_mb=0.2, max_megapixels=1.0))


@pytest.fixture
def client(site: Site) -> TestClient:
    return TestClient(site.app, "http://127.0.0.1:8765", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def served(site: Site) -> Iterator[str]:
    """The address of a server that runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(site.app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """The bytes of a picture."""

    def made(width: int = 40, height: int = 30, form: str = "PNG", **how: Any) -> bytes:
        file = io.BytesIO()
        Image.radial_gradient("L").resize((width, height)).convert("RGB").save(file, form, **how)
        return file.getvalue()

    return made
