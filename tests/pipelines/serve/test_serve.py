"""How the server starts, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest

from hdovd.core import HdovdError
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.serve.config import ServeConfig
from hdovd.pipelines.serve.serve import serve


def test_there_has_to_be_something_to_serve(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"^nothing to serve: give --run RUN .*, --cache CACHE to search, or both$"):
        serve(ServeConfig())
    with pytest.raises(HdovdError, match="none"):
        serve(ServeConfig(run=tmp_path / "none"))
    with pytest.raises(HdovdError, match="none"):
        serve(ServeConfig(cache=tmp_path / "none"))


def test_an_address_that_cannot_be_had(distilled: RunFolder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            HdovdError, match=rf"^cannot listen at 127.0.0.1, port {port} \(Address already in use\): give"
        ):
            serve(ServeConfig(run=distilled.path, port=port))
    with pytest.raises(HdovdError, match=r"^cannot listen at no.such.host.invalid, port 0 \("):
        serve(ServeConfig(run=distilled.path, host="no.such.host.invalid", port=0))


@pytest.mark.parametrize("package", ["uvicorn", "starlette.applications", "python_multipart.exceptions"])
def test_without_a_web_server(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "hdovd.pipelines.serve.serve", raising=False)
    with pytest.raises(HdovdError, match=r'^hdovd serve needs a web server: pip install "hdovd\[serve\]" \('):
        import_module("hdovd.pipelines.serve.serve")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_ctrl_c_ends_it(number: int, code: int, cache: Path, forked: Callable[..., Any], tmp_path: Path) -> None:
    started = forked(["serve", "--cache", cache, "--port", 0, "--host", "0.0.0.0", "--device", "cpu"], tmp_path)
    for _ in range(600):
        if found := re.search(
            r"^serving http://0.0.0.0:(\d+) \(Ctrl\+C stops\)$", started.out.read_text(), re.MULTILINE
        ):
            break
        time.sleep(0.1)
    assert found, started.out.read_text() + started.err.read_text()
    with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}") as client:  # a connection that stays open
        assert client.get("/").status_code == 200
        assert client.post("/search", data={"words": "tree"}).status_code == 200
        os.kill(started.pid, number)
        ended = started.wait()
    assert ended.returncode == code, ended.stderr
    assert ended.stderr == ("stopped\n" if number == signal.SIGINT else "")
    assert "note: --host 0.0.0.0: anyone who reaches this machine can use it; there is no password\n" in ended.stdout
