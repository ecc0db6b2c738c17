"""One flipped bit anywhere in a cache, in tar shards or in a run: found, refused, or harmless.

Harmless is a bit after whose flip all values that are read are the very same, bit for bit. HDOVD_FLIPS sets how many
flips of each kind; `pytest -s` prints the counts.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.cache.tar_shards import TarShards
from hdovd.core import HdovdError, lines_to
from hdovd.modeling.base import build_detector
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.extraction.export import export_tars
from hdovd.pipelines.extraction.source import ExportConfig
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.hooks import load_checkpoint
from hdovd.pipelines.training.train import STATE

FLIPS = int(os.environ.get("HDOVD_FLIPS", "25"))
NOT_READ = ("log.jsonl", "log.csv")  # of a run: what a person or a table reads, and no other stage


def read_cache(root: Path) -> Any:
    """What training reads of a cache."""
    cache = FeatureCache(root)
    cache.require_together()
    values: list[Any] = [cache.identity()["levels"], cache.failed(), cache.set.skipped, cache.set.object_text]
    values += [cache.embeddings(level) for level in (Level.CLASS, Level.NOUN, Level.IMAGE)] + [cache.names(Level.CLASS)]
    for image in cache.image_ids().tolist():
        rows = cache.instances(image)
        values.append([getattr(rows, name) for name in rows.__slots__])
    return values


def read_shards(root: Path) -> Any:
    """What training reads of tar shards."""
    shards = TarShards(root)
    values: list[Any] = [shards.meta.identity(), shards.meta.tensors, shards.meta.features.to_tree()]
    for number in shards.numbers:
        for place, raw in shards.raw(number):
            sample = shards.decode(place, raw)
            values.append((sample.about, sample.picture, sample.arrays))
    return values


def read_run(root: Path) -> Any:
    """What is read of a run to evaluate it, and to go on with it."""
    run = RunFolder.open(root)
    recipe, texts = run.recipe(), run.class_embeddings()
    model = build_detector(recipe, texts.shape[1], initialise=False)
    run.load_model(model)
    return run.record(), recipe.model_dump(), texts, dict(model.state_dict()), load_checkpoint(root, STATE)


def same(value: Any) -> str:
    """A hash of all values."""
    return hashlib.sha256(repr(plain(value)).encode()).hexdigest()


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((str(key), plain(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return (value.shape, value.dtype.str, value.tobytes()) if hasattr(value, "tobytes") else repr(value)


def verified(root: Path) -> bool:
    """Whether hdovd cache verify has nothing to say."""
    said: list[str] = []
    with lines_to(said.append):
        findings = check_cache(CheckConfig(cache=root)).findings
    return not findings and not any(line.startswith("no checksum") for line in said)


@pytest.mark.parametrize(("kind", "read"), [("cache", read_cache), ("shards", read_shards), ("run", read_run)])
def test_a_flipped_bit(
    kind: str, read: Callable[[Path], Any], cache: Path, distilled: RunFolder, tmp_path: Path
) -> None:
    root = tmp_path / kind
    if kind == "shards":
        export_tars(ExportConfig(cache=cache, out=root, samples=8))
    else:
        shutil.copytree(cache if kind == "cache" else distilled.path, root)
    files = [
        file for file in sorted(root.rglob("*")) if file.is_file() and file.name not in NOT_READ and file.stat().st_size
    ]
    draw, sound, counts = random.Random(kind), same(read(root)), Counter[str]()
    for number in range(FLIPS):
        file = files[number % len(files)] if number < len(files) else draw.choice(files)
        before = file.read_bytes()
        at, bit = draw.randrange(len(before)), draw.randrange(8)
        file.write_bytes(before[:at] + bytes([before[at] ^ 1 << bit]) + before[at + 1 :])
        where = f"{file.relative_to(root)}, byte {at}, bit {bit}"
        try:
            assert same(read(root)) == sound, f"{where}: other values, and no error"
            outcome = "harmless to a reader"
        except HdovdError:
            outcome = "refused by a reader"
        if kind != "run":
            try:
                found = not verified(root)
            except HdovdError:
                found = True
            assert found or outcome.startswith("harmless"), f"{where}: verify finds nothing"
            outcome += ", found by verify" if found else ", not found by verify"
        counts[outcome] += 1
        file.write_bytes(before)
    print(
        f"\n{kind}: {FLIPS} flips in {len(files)} files: "
        + "; ".join(f"{count} {outcome}" for outcome, count in counts.items())
    )
