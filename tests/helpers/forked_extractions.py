"""Real extractions in real processes, for scenes in which they are killed or started together (`killed_scenes`,
`spread_scenes`).

    facts = play(config, *SCENES)

The process of the tests, which has imported everything, forks: each child is an `hdovd extract-clip` that costs no
second of start. Facts say what every scene saw, and tests judge it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hdovd.cli.main import main
from hdovd.core import lines_to
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.teachers.openclip import load_clip

PART_ROWS, BATCH = 16, 16  # 45 parts
Body = Callable[[], object]
Facts = dict[str, Any]


class Child:
    """A forked process; what it prints goes to a file."""

    def __init__(self, body: Body) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this is
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(self._out.fileno(), 1)
            os.dup2(self._out.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
            os.environ["OMP_NUM_THREADS"] = "1"  # threads of OpenMP do not live through forks
            code = 0
            try:
                body()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
                code = 3
            os._exit(code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code; minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def printed(self) -> str:
        self._out.seek(0)
        return self._out.read().decode()


class Extractions:
    """Ways to run one extraction into a folder."""

    def __init__(self, tree: dict[str, Any], root: Path) -> None:
        self.tree, self.root = tree, root
        self.teacher = load_clip(tree["clip"], None, device="cpu")
        since = time.monotonic()
        self.whole = self.folder("unbroken")
        unbroken = Child(self.command(self.whole))
        assert unbroken.wait() == 0, unbroken.printed()
        self.seconds, self.bytes = time.monotonic() - since, digests(self.whole)

    def folder(self, name: str) -> Path:
        return self.root / name

    def command(self, cache: Path, *more: str) -> Body:
        """The command line."""
        tree = self.tree
        words = [
            "extract-clip",
            "--data",
            tree["data"]["root"],
            "--cache",
            str(cache),
            "--clip",
            tree["clip"],
            "--device",
            "cpu",
        ]
        for name in ("protocol", "proposals", "vocabulary", "captions"):
            words += [f"--{name}", tree[name]]
        words += ["--part-rows", str(PART_ROWS), "--batch-size", str(BATCH), *more]

        def run() -> None:
            sys.argv = ["hdovd", *words]
            main()

        return run

    def function(self, cache: Path, teacher: Any = None, before: Body = lambda: None, **changes: Any) -> Body:
        """The pipeline function with the model that is loaded already."""
        config = ExtractConfig.from_dict(
            self.tree, cache, device="cpu", **{"part_rows": PART_ROWS, "batch_size": BATCH} | changes
        )

        def run() -> None:
            before()
            with lines_to(partial(print, flush=True)):
                extract_clip(config, teacher or self.teacher)

        return run

    def same(self, cache: Path) -> bool:
        return digests(cache) == self.bytes


class Interrupted:
    """The teacher, with something that happens before the n-th batch is embedded, the probe's two counted."""

    def __init__(self, teacher: Any, batch: int, happens: Body) -> None:
        self._teacher, self._left, self._happens = teacher, batch, happens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def embed_images(self, pixels: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            self._happens()
        return self._teacher.embed_images(pixels)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def damaged(folder: Path) -> list[str]:
    """Records of finished parts that do not say what is there."""
    wrong = []
    for file in folder.rglob("parts/*.json"):
        for name, about in json.loads(file.read_text())["objects"].items():
            path = file.parent.parent / name
            data = path.read_bytes() if path.is_file() else None
            if data is None or len(data) != about["bytes"] or hashlib.sha256(data).hexdigest() != about["sha256"]:
                wrong.append(str(path))
    return wrong


def play(config: ExtractConfig, *scenes: Callable[[Extractions], Facts]) -> Facts:
    """Play scenes for an extraction; the facts of each, by its name."""
    with tempfile.TemporaryDirectory() as scratch:
        extractions = Extractions(json.loads(json.dumps(config.to_dict())), Path(scratch))
        return {scene.__name__: scene(extractions) for scene in scenes}
