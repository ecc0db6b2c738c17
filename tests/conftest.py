"""What several test folders share: a micro world, a tiny random CLIP, proposals near objects, and a cache of them.

Session fixtures are read-only: a test that damages something copies it first (`copied_world`, `copied_cache`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.data import DataPaths
from hdovd.pipelines.demo.world import BASE, make_world
from hdovd.pipelines.extraction.config import ExtractConfig

if TYPE_CHECKING:  # pytest-xdist's own process reads this file too, and needs no torch
    import torch
    from pretended_cuda import PretendedCuda

TRAIN_IMAGES, VAL_IMAGES = 24, 8
# The demo recipe cut to a second an epoch. Thresholds of zero: an untrained detector must still detect something.
MICRO_SETTINGS = (
    "detector.backbone.fpn_channels=16",
    "detector.rpn.samples=32",
    "detector.rpn.pre_nms=100",
    "detector.rpn.post_nms=30",
    "detector.head.fc_channels=32",
    "detector.head.samples=16",
    "input.short_side=96",
    "input.long_side=128",
    "pseudo_boxes.min_side=4.0",
    "pseudo_boxes.reliability_centre=0.0",
    "pseudo_boxes.reliability_width=0.026",
    "pseudo_boxes.reliability_scale=1.3",
    "loss.instance.queue=64",
    "loss.image.queue=32",
    "inference.score_threshold=0.0",
    "train.epochs=1",
    "train.batch_size=8",
    "train.warmup_iterations=1",
    "train.precision=fp32",
    "train.workers=0",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors here are tiny: threads cost more than they gain, and sums come out the same on every machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test makes stays in the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_tokenizer() -> Iterator[None]:
    """open_clip's tokenizer reads its vocabulary once, not with every CLIP: that is a third of a micro extraction."""
    import open_clip.factory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.factory, "SimpleTokenizer", functools.cache(open_clip.factory.SimpleTokenizer))
        yield


@pytest.fixture
def pretended_cuda() -> Iterator[PretendedCuda]:
    """A GPU that is not there, for one test; no operation may mix its tensors with the CPU's."""
    from pretended_cuda import PretendedCuda

    with PretendedCuda() as cuda:
        yield cuda
    assert not cuda.mixed


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder with 24 training and 8 validation pictures, protocol.toml and vocabulary.txt."""
    root = tmp_path_factory.mktemp("shared") / "world"
    make_world(root, train_images=TRAIN_IMAGES, val_images=VAL_IMAGES, seed=3, workers=1)
    return root


@pytest.fixture(scope="session")
def kept(world: Path) -> list[int]:
    """The training images that hold a base box: all that extraction and training may use."""
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    base = {c["id"] for c in tree["categories"] if c["name"] in BASE}
    ids = sorted({a["image_id"] for a in tree["annotations"] if a["category_id"] in base})
    assert TRAIN_IMAGES - 4 <= len(ids) < TRAIN_IMAGES  # nearly all, and one at least to leave out
    return ids


@pytest.fixture(scope="session")
def save_clip() -> Callable[..., str]:
    """Save a tiny random CLIP in open_clip's local-dir form; returns its `local-dir:` name."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    def save(
        folder: Path,
        *,
        seed: int = 0,
        embed_dim: int = 24,
        image_size: int = 32,
        quick_gelu: bool | None = None,
        form: str = "safetensors",
        preprocess: dict[str, Any] | None = None,
    ) -> str:
        config: dict[str, Any] = {
            "embed_dim": embed_dim,
            "vision_cfg": {"image_size": image_size, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        } | ({} if quick_gelu is None else {"quick_gelu": quick_gelu})
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config).eval()
        with torch.no_grad():  # a fresh CLIP answers nearly the same to everything: leave only what the input decides
            for part in (model.visual.class_embedding, model.visual.positional_embedding, model.positional_embedding):
                part.zero_()
            model.visual.conv1.weight.mul_(3)
            model.token_embedding.weight.normal_()
            model.token_embedding.weight[49406:].zero_()  # start and end of text
            model.transformer.resblocks[0].attn.in_proj_weight.mul_(4)
            for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
                block.mlp.c_fc.weight.mul_(4)  # so that the activation matters
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        if form == "safetensors":
            save_file(state, folder / "open_clip_model.safetensors")
        else:
            torch.save(state, folder / "open_clip_pytorch_model.bin")
        tree = {
            "model_cfg": config,
            "preprocess_cfg": {
                "mean": [0.5, 0.4, 0.45],
                "std": [0.3, 0.25, 0.2],
                "interpolation": "bicubic",
                "resize_mode": "squash",
            }
            | (preprocess or {}),
        }
        (folder / "open_clip_config.json").write_text(json.dumps(tree))
        return f"local-dir:{folder}"

    return save


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory, save_clip: Callable[..., str]) -> str:
    """The tiny CLIP of the session: D 24, pictures of 32 px."""
    return save_clip(tmp_path_factory.mktemp("shared") / "clip")


class _CountingTeacher:
    """A real CLIP that counts what it is asked for."""

    def __init__(self, clip: str) -> None:
        from hdovd.pipelines.teachers.openclip import load_clip

        self._teacher = load_clip(clip, None, device="cpu")
        self.batches: list[int] = []  # pictures in each; those that fill a batch up are zeros, and do not count
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def embed_images(self, pixels: torch.Tensor) -> np.ndarray:
        self.batches.append(int(pixels.flatten(1).any(dim=1).sum()))
        return self._teacher.embed_images(pixels)

    def embed_names(self, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        self.names += names
        return self._teacher.embed_names(names, templates)

    @property
    def pictures(self) -> int:
        """Pictures and crops embedded; the first four batches are the probe's."""
        return sum(self.batches[4:])


@pytest.fixture
def counting(clip: str) -> _CountingTeacher:
    """A teacher for `extract_clip`: its `pictures` and `names` are what one extraction computed."""
    return _CountingTeacher(clip)


@pytest.fixture(scope="session")
def proposals(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proposal file: two boxes near every object, base or novel, some reaching over the edge; none for image 2."""
    rng = np.random.default_rng(5)
    entries = []
    for a in json.loads((world / "annotations" / "instances_train2017.json").read_text())["annotations"]:
        if a["image_id"] == 2:
            continue
        for _ in range(2):
            x, y, w, h = np.array(a["bbox"]) + rng.uniform(-4, 4, 4)
            entries.append({"image_id": a["image_id"], "bbox": [x, y, w, h], "score": float(rng.uniform())})
    file = tmp_path_factory.mktemp("shared") / "proposals.json"
    file.write_text(json.dumps(entries))
    return file


@pytest.fixture(scope="session")
def extraction(world: Path, clip: str, proposals: Path) -> Callable[..., ExtractConfig]:
    """The extraction of the micro world into a folder, with changes: `extraction(folder, templates=("{}",))`."""

    def config(cache: Path, *, data: Path | None = None, **changes: Any) -> ExtractConfig:
        root = data or world
        values: dict[str, Any] = {
            "data": DataPaths(root),
            "cache": cache,
            "clip": clip,
            "proposals": proposals,
            "vocabulary": root / "vocabulary.txt",
            "captions": root / "annotations" / "captions_train2017.json",
            "protocol": str(root / "protocol.toml"),
            "device": "cpu",
        }
        return ExtractConfig(**(values | changes))

    return config


@pytest.fixture(scope="session")
def cache(
    extraction: Callable[..., ExtractConfig],
    contents: Callable[[Path], dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The micro world's feature cache, all levels, nouns from captions. Runs leave a record in theirs: they read
    `training_cache`.
    """
    from hdovd.pipelines.extraction.extract_clip import extract_clip

    folder = tmp_path_factory.mktemp("shared") / "cache"
    extract_clip(extraction(folder))
    before = contents(folder)
    yield folder
    changed = [
        f"{name}: {(folder / name).read_bytes()[:300]!r}" if (folder / name).exists() else name
        for name, _ in sorted(before.items() ^ contents(folder).items())
    ]
    assert not changed, f"a test wrote to the cache that all tests of the session read: {changed}"


@pytest.fixture(scope="session")
def training_cache(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that micro runs read, and that keeps a record of them."""
    return Path(shutil.copytree(cache, tmp_path_factory.mktemp("runs") / "cache"))


@pytest.fixture
def copied_world(world: Path, tmp_path: Path) -> Path:
    """A copy of the micro world to damage."""
    return Path(shutil.copytree(world, tmp_path / "copied world"))


@pytest.fixture
def copied_cache(cache: Path, tmp_path: Path) -> Path:
    """A copy of the micro world's cache to damage."""
    return Path(shutil.copytree(cache, tmp_path / "copied cache"))


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """The sha256 of every file below a folder, by name."""
    return lambda folder: {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="session")
def untouched(contents: Callable[[Path], dict[str, str]]) -> Callable[[Path], Any]:
    """`with untouched(folder):` checks that nothing was written below it, not even files that were deleted again."""

    def state(folder: Path) -> tuple[dict[str, str], dict[Path, int]]:
        return contents(folder), {path: path.stat().st_mtime_ns for path in (folder, *sorted(folder.rglob("*")))}

    @contextmanager
    def watch(folder: Path) -> Iterator[None]:
        before = state(folder)
        yield
        assert state(folder) == before

    return watch


@pytest.fixture(scope="session")
def micro_recipe() -> Callable[..., Recipe]:
    """The demo recipe at micro size, with settings laid over it."""
    return lambda *settings: load_recipe("demo", [*MICRO_SETTINGS, *settings])


@pytest.fixture(scope="session")
def micro_settings() -> list[str]:
    """The micro size as words of a command line."""
    return ["--recipe", "demo", *(word for setting in MICRO_SETTINGS for word in ("--set", setting))]


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS` in a process of its own, away from the source tree."""

    def run(arguments: Sequence[object], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"} | environment
        return subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
        )

    return run


@dataclass(frozen=True)
class _Forked:
    """A process that runs; what it prints goes to files."""

    pid: int
    words: tuple[str, ...]
    out: Path
    err: Path

    def wait(self) -> subprocess.CompletedProcess[str]:
        """When it has ended: its exit code, or minus the signal that ended it, and what it printed."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return subprocess.CompletedProcess(self.words, code, self.out.read_text(), self.err.read_text())


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., _Forked]:
    """Start `hdovd WORDS` in a process forked from this one, which has imported torch already: a fresh one needs
    seconds for that.
    """
    import forked_commands

    def start(words: Sequence[object], cwd: Path) -> _Forked:
        prints, printed = tmp_path_factory.mktemp("prints"), tuple(map(str, words))
        with (prints / "out").open("w") as out, (prints / "err").open("w") as err:
            pid = forked_commands.start(printed, out.fileno(), err.fileno(), cwd=cwd, env=forked_commands.SAME_FOR_ALL)
        return _Forked(pid, ("hdovd", *printed), prints / "out", prints / "err")

    return start
