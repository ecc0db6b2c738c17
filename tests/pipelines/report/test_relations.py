"""The matrices of teacher and student, of a run that was really trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hdovd.cache.identity import sealed
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError
from hdovd.data import DataPaths, Split
from hdovd.modeling.losses.instance import relation_loss
from hdovd.pipelines.demo.world import BASE
from hdovd.pipelines.extraction.source import cache_of, data_of_cache
from hdovd.pipelines.report.report import Relations, relations
from hdovd.pipelines.runs import RunFolder


def _training(run: RunFolder, world: Path) -> Split:
    return DataPaths(world).load("train2017", run.protocol(), base_only=True)


@pytest.fixture(scope="module")
def found(distilled: RunFolder, world: Path) -> Relations:
    return relations(distilled, _training(distilled, world), 4)


def test_matrices_are_cosines_of_the_same_boxes(found: Relations) -> None:
    n = len(found.names)
    assert n > 4
    assert found.teacher.shape == found.student.shape == (n, n)
    for matrix in (found.teacher, found.student):
        np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-5)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    assert len(found.image_ids) == 4


def test_teacher_rows_are_those_of_the_cache(found: Relations, distilled: RunFolder) -> None:
    """Every cosine between base boxes is one of the cache's; boxes without a positive RoI are not there."""
    cache = FeatureCache(distilled.record()["cache"]["path"])
    rows = np.concatenate(
        [cache.instances(image).base_boxes().embedding.astype(np.float32) for image in found.image_ids]
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    base = np.flatnonzero(~found.pseudo)
    assert 10 <= len(base) <= len(rows)
    expected, shown = rows @ rows.T, found.teacher[np.ix_(base, base)]
    assert shown.std() > 0.05
    assert np.abs(shown[..., None, None] - expected).min(axis=(2, 3)).max() < 1e-4


def test_base_boxes_come_first_and_equal_names_together(found: Relations) -> None:
    assert found.pseudo.tolist() == sorted(found.pseudo.tolist())
    for pseudo in (False, True):
        names = [name for name, p in zip(found.names, found.pseudo.tolist(), strict=True) if p == pseudo]
        assert names == sorted(names)
        assert pseudo or set(names) <= set(BASE)


def test_loss_and_correlation_are_of_these_matrices(found: Relations, distilled: RunFolder) -> None:
    above = np.triu_indices(len(found.names), k=1)
    assert found.correlation == pytest.approx(np.corrcoef(found.teacher[above], found.student[above])[0, 1])
    loss = distilled.recipe().loss.instance
    values, vectors = np.linalg.eigh(found.teacher.astype(np.float64))
    teacher = torch.from_numpy(vectors * np.sqrt(values.clip(min=0)))  # rows with these cosines
    values, vectors = np.linalg.eigh(found.student.astype(np.float64))
    student = torch.from_numpy(vectors * np.sqrt(values.clip(min=0)))
    assert found.loss == pytest.approx(
        float(relation_loss(student, teacher, loss.relation_tau, loss.relation_temperature)), rel=1e-4
    )


def test_a_run_without_the_level_says_so(base_only: RunFolder, world: Path) -> None:
    with pytest.raises(HdovdError, match="no instance level"):
        relations(base_only, _training(base_only, world), 4)


def test_a_cache_that_was_extracted_anew_is_not_taken_for_the_runs_own(distilled: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(distilled.path, tmp_path / "run")))
    record = run.record()
    record["cache"]["levels"]["instance"]["key"] = "0" * 24
    _write(run, record)
    with pytest.raises(
        HdovdError, match=r"no set of features with the products that the run was trained from \(it has default\)"
    ):
        cache_of(run)


def test_data_are_those_of_the_runs_own_set(
    distilled: RunFolder, copied_cache: Path, world: Path, tmp_path: Path
) -> None:
    run = RunFolder(Path(shutil.copytree(distilled.path, tmp_path / "run")))
    record = run.record()
    record["cache"]["path"] = str(copied_cache)
    own = json.loads((copied_cache / "sets" / "default.json").read_text())
    other = own | {
        "levels": own["levels"] | {"class": "0" * 24},
        "made_from": own["made_from"] | {"data": {"root": "/elsewhere"}},
    }
    (copied_cache / "sets" / "aaa.json").write_text(json.dumps(sealed(other)))
    _write(run, record)
    assert data_of_cache(run) == DataPaths(world)


@pytest.mark.parametrize(
    ("recorded", "why"),
    [
        ({"path": None, "levels": {}}, "does not say which cache"),
        ({"path": "c", "levels": {}}, "does not say which cache"),
        ({"path": "shards/{000000..000002}.tar", "levels": {"image": {"key": "k"}}}, "tar shards"),
        ({"path": "gone", "levels": {"image": {"key": "k"}}}, "no feature cache at gone"),
    ],
)
def test_a_record_without_a_cache_of_use(
    distilled: RunFolder, tmp_path: Path, recorded: dict[str, object], why: str
) -> None:
    _write(RunFolder(tmp_path), distilled.record() | {"cache": recorded})
    with pytest.raises(HdovdError, match=why):
        cache_of(RunFolder(tmp_path))


def _write(run: RunFolder, record: dict[str, object]) -> None:
    """A record as an older version wrote it, without a checksum."""
    (run.path / "run.json").write_text(json.dumps({name: value for name, value in record.items() if name != "sha256"}))
