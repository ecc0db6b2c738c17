"""Caches in object stores: the contract over HTTP against a real S3 server process, with connections that break and
answers that wait.
"""

from __future__ import annotations

import operator
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from store_contract import COUNTS, StoreContract, begin, contents, ragged, write_parts
from torch.utils.data import DataLoader

import hdovd.cache.store
from hdovd.cache import TABLE_ARRAYS, Catalog, Level
from hdovd.cache.reader import FeatureCache
from hdovd.cache.rows import Rows
from hdovd.cache.store import open_folder
from hdovd.core import HdovdError
from hdovd.pipelines.extraction.extract_clip import extract_clip

QUICK = {
    "connect_timeout": 2,
    "read_timeout": 5,
    "retries": {"mode": "standard", "total_max_attempts": 1},
}  # gives up at once


class Proxy:
    """A TCP proxy that cuts every n-th answer in the middle, keeps every n-th waiting, or is down."""

    def __init__(self, target: int) -> None:
        self.target, self.cut_every, self.wait_every, self.wait_s, self.down_after = target, 0, 0, 0.0, -1
        self.answers = self.cuts = self.waits = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self.down_after == 0:
            _reset(client)
            return
        with (
            socket.create_connection(("127.0.0.1", self.target)) as server,
            selectors.DefaultSelector() as selector,
            client,
        ):
            for one, other in ((client, server), (server, client)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(one, selectors.EVENT_READ, other)
            try:
                while all(self._pass_on(key, from_server=key.fileobj is server) for key, _ in selector.select()):
                    pass
            except OSError:
                pass
            _reset(client)

    def _pass_on(self, key: selectors.SelectorKey, *, from_server: bool) -> bool:
        """False to cut the connection."""
        data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
        fate = self._next() if from_server else "goes"
        if fate == "waits":
            time.sleep(self.wait_s)
        key.data.sendall(data[: len(data) // 2] if fate == "cut" else data)
        return bool(data) and fate != "cut" and self.down_after != 0

    def _next(self) -> str:
        with self._lock:
            self.answers += 1
            self.down_after -= self.down_after > 0
            if self.cut_every and self.answers % self.cut_every == 0:
                self.cuts += 1
                return "cut"
            if self.wait_every and self.answers % self.wait_every == 0:
                self.waits += 1
                return "waits"
        return "goes"


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, Path(__file__).parents[1] / "helpers" / "s3_server.py"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.kill()


@pytest.fixture
def s3(s3_port: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in the bucket, by URL, and an environment that leads there."""
    environment = {
        "ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        "ACCESS_KEY_ID": "test",
        "SECRET_ACCESS_KEY": "test",
        "DEFAULT_REGION": "us-east-1",
        "CONFIG_FILE": "/dev/null",
        "SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # clients keep the endpoint that they began with
    return f"s3://caches/{request.node.name}/a cache [1]"


@pytest.fixture
def proxy(s3: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, through which `s3` goes."""
    proxy = Proxy(s3_port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.stop()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's configuration: to give up at once."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": QUICK})


class TestS3(StoreContract):
    @pytest.fixture
    def url(self, s3: str) -> str:
        return s3


class TestMemory(StoreContract):
    exclusive_between_threads = False

    @pytest.fixture
    def url(self) -> Iterator[str]:
        yield "memory://a cache [1]/x"
        MemoryFileSystem.store.clear()


# --- a network with faults ---


def test_dropped_connections_are_tried_again(s3: str, proxy: Proxy, tmp_path: Path) -> None:
    arrays = ragged(COUNTS)
    write_parts(begin(open_folder(tmp_path / "local"), arrays), arrays)
    proxy.cut_every = 9
    folder = open_folder(s3)
    product = write_parts(begin(folder, arrays), arrays)
    assert contents(folder) == contents(open_folder(tmp_path / "local"))
    rows = Rows(product, "embedding")
    for start in range(0, 19, 3):
        np.testing.assert_array_equal(rows.read(start, 19), arrays["embedding"][start:])
    for name in TABLE_ARRAYS[Level.INSTANCE]:
        np.testing.assert_array_equal(product.table(name), arrays[name])
    assert proxy.cuts > 5


def test_a_large_answer_that_breaks_off_is_read_again(s3: str, proxy: Proxy) -> None:
    data = np.random.default_rng(0).bytes(3_000_000)  # some 50 pieces of an answer
    folder = open_folder(s3)
    folder.write("a", data)
    folder.write("b", data[::-1])
    proxy.cut_every = 70
    for _ in range(3):
        assert folder.read_many(["a", "b"]) == [data, data[::-1]]
    assert proxy.cuts > 2


def test_the_tries_of_the_environment_win(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(fsspec.config.conf, "s3", raising=False)
    retries = hdovd.cache.store._file_system(s3)[0].config_kwargs.get("retries")
    assert retries == hdovd.cache.store.S3_CLIENT["retries"]
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "20")
    assert "retries" not in hdovd.cache.store._file_system(s3)[0].config_kwargs
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": QUICK})
    assert hdovd.cache.store._file_system(s3)[0].config_kwargs["retries"] == QUICK["retries"]


def test_slow_answers_are_asked_for_again(s3: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = QUICK | {"read_timeout": 0.5, "retries": {"mode": "standard", "total_max_attempts": 4}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": patient})
    proxy.wait_every, proxy.wait_s = 12, 0.8
    arrays = ragged((3, 0, 6))
    product = write_parts(begin(open_folder(s3), arrays), arrays)
    np.testing.assert_array_equal(Rows(product, "embedding").read(0, 9), arrays["embedding"])
    assert proxy.waits > 3


@pytest.mark.parametrize("fault", ["down", "silent"])
def test_a_store_that_cannot_be_reached_is_an_error_everywhere(
    s3: str, proxy: Proxy, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`exists` too: "no" would have everything extracted again."""
    patient = open_folder(s3)
    patient.write("x/a", b"1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": QUICK | {"read_timeout": 0.2}})
    monkeypatch.setattr(hdovd.cache.store, "WRITE_S", 0.2)
    if fault == "down":
        proxy.down_after = 0
    else:
        proxy.wait_every, proxy.wait_s = 1, 3600
    folder = open_folder(s3)
    uses: list[Callable[[], object]] = [
        lambda: folder.exists("x/a"),
        lambda: folder.write("x/b", b"2"),
        lambda: folder.read("x/a"),
        lambda: folder.read_many(["x/a"]),
        lambda: folder.sizes("x"),
        lambda: folder.write("x/c", b"", exclusive=True),
        lambda: folder.modified("x/a"),
        lambda: folder.delete("x/a"),
        lambda: FeatureCache(s3),
        lambda: Catalog.create(s3),
    ]
    for use in uses if fault == "down" else uses[:3]:
        with pytest.raises(HdovdError, match=r"s3://caches/.*run the same command again"):
            use()
    proxy.down_after, proxy.wait_every = -1, 0
    assert not patient.exists("x/b")
    assert patient.read("x/a") == b"1"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("answers", [1, 12, 25, 38])
def test_what_a_broken_write_leaves_is_never_whole(s3: str, proxy: Proxy, tmp_path: Path, answers: int) -> None:
    arrays = ragged(COUNTS)
    write_parts(begin(open_folder(tmp_path / "local"), arrays), arrays)
    folder = open_folder(s3)
    proxy.down_after = answers
    with pytest.raises(HdovdError, match="run the same command again"):
        write_parts(begin(folder, arrays), arrays)
    proxy.down_after = -1
    there = contents(folder)
    for name, data in there.items():
        assert data == open_folder(tmp_path / "local").read(name)
    assert not any(name.endswith("parts/000004.json") for name in there)
    assert write_parts(begin(folder, arrays), arrays).whole
    assert contents(folder) == contents(open_folder(tmp_path / "local"))


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("url", "said"), [("s3://no-such-bucket/x", "Is the store there"), ("nothing-such://x/y", "hdovd\\[s3\\]")]
)
def test_a_place_that_is_not_there(url: str, said: str) -> None:
    with pytest.raises(HdovdError, match=said):
        Catalog.create(url)


# --- whole caches ---


def test_extraction_into_a_bucket_is_the_local_one(
    s3: str, proxy: Proxy, quick: None, cache: Path, kept: list[int], extraction: Callable[..., Any]
) -> None:
    """The store goes away in the midst of it, and the same command finishes."""
    proxy.down_after = 120
    with pytest.raises(HdovdError, match="run the same command again"):
        extract_clip(extraction(s3))
    proxy.down_after = -1
    with pytest.raises(HdovdError):
        FeatureCache(s3)
    report = extract_clip(extraction(s3))
    assert report.whole
    assert "extend" in report.levels.values() or "hit" in report.levels.values()  # it went on
    assert contents(open_folder(s3)) == contents(open_folder(cache))
    local, remote = FeatureCache(cache), FeatureCache(s3)
    for image_id in kept:
        for one, other in zip(_values(local, image_id), _values(remote, image_id), strict=True):
            np.testing.assert_array_equal(one, other)
    assert set(extract_clip(extraction(s3)).levels.values()) == {"hit"}


def _values(cache: FeatureCache, image_id: int) -> list[np.ndarray]:
    rows = cache.instances(image_id)
    return [cache.image_embedding(image_id), *(getattr(rows, name) for name in rows.__slots__)]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_after_their_parent_has(
    s3: str, tmp_path: Path, write_cache: Callable[..., Any], start: str
) -> None:
    """Event loops and connections do not live through a fork. The loader's timeout ends a worker that hangs."""
    written = write_cache(s3, part_rows=4)
    write_cache(tmp_path / "cache", part_rows=4)
    caches = [FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "cache", mapped=False), FeatureCache(s3)]
    reads = [
        partial(read, image_id)
        for cache in caches
        for image_id in written.image_ids
        for read in (cache.instances, cache.instance_embeddings, cache.image_embedding)
    ]
    for cache in caches:
        cache.instances(40)  # of the instance level rows alone, no tables: workers read those
    loader = DataLoader(
        reads,
        batch_size=None,
        collate_fn=operator.call,
        num_workers=2 if start == "fork" else 1,  # type: ignore[arg-type]
        multiprocessing_context=start,
        timeout=60,
    )
    found = list(loader)
    assert len(found) == 3 * 3 * 4
    for rows, embeddings, image, image_id in zip(
        found[::3], found[1::3], found[2::3], written.image_ids * 3, strict=True
    ):
        for name, wanted in written.instances[image_id].items():
            np.testing.assert_array_equal(getattr(rows, name), wanted)
        np.testing.assert_array_equal(embeddings, rows.embedding)
        np.testing.assert_array_equal(image, written.images[image_id])
    for cache in caches:  # the parent goes on, with what it has open and anew
        np.testing.assert_array_equal(cache.instance_embeddings(23), written.instances[23]["embedding"])
    assert len(FeatureCache(s3).instances(23).box) == 4
