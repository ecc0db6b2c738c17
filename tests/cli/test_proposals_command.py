"""`hdovd proposals convert | info`: what a user reads, and how mistakes end."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hdovd.cli.main import main

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hdovd", "proposals", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return command


def test_a_published_list_becomes_npz_and_says_its_order(run: Run, tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 90} for i in (30, 4)]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    rows = [np.array([[1, 2, 30, 40, 0.5]], np.float32), np.array([[5, 6, 70, 80, 0.9], [0, 0, 9, 9, 0.1]], np.float32)]
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(rows))
    code, text = run("convert", tmp_path / "p.pkl", "--out", tmp_path / "p.npz")
    assert (code, "--annotations" in text) == (1, True)
    code, text = run(
        "convert",
        tmp_path / "p.pkl",
        "--out",
        tmp_path / "p.npz",
        "--annotations",
        tmp_path / "a.json",
        "--order",
        "id",
    )
    assert code == 0
    assert "by ascending image id (--order id)" in text
    identity = text.split("identity ")[1].split(";")[0]
    code, text = run("info", tmp_path / "p.npz")
    assert code == 0
    assert identity in text
    assert "made by: unknown" in text
    with np.load(tmp_path / "p.npz") as file:
        assert file["image_id"].tolist() == [4, 30]
