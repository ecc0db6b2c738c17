"""`hdovd bench extract` at a tiny size: its figures are what they say, and mistakes are told before anything is
made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hdovd.cache import Catalog, Level
from hdovd.cli.main import app
from hdovd.core import HdovdError
from hdovd.pipelines.extraction import forecast as forecasting
from hdovd.pipelines.extraction.config import ForecastConfig


def test_the_extract_command(tmp_path: Path, clip: str) -> None:
    words = [
        "--images",
        "4",
        "--boxes",
        "3",
        "--picture",
        "64x48",
        "--rounds",
        "2",
        "--crop-scales",
        "1,1.5",
        "--forecast",
        "100,1000",
        "--json",
        str(tmp_path / "speed.json"),
        "--folder",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, ["bench", "extract", "--clip", clip, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["crops"] == 2 * found["batch_size"]
    assert found["crops"] - found["fill"] == 4 * (2 * 3 + 1)
    assert 0 < found["efficiency"] < 2
    assert found["stages"].keys() == {"preparation", "writing"}
    real, rest = (
        found["crops"] - found["fill"],
        found["crops"] / found["end_to_end"] - found["crops"] / found["model_only"],
    )
    assert 1 / found["at_scale"] == pytest.approx(1 / found["model_only"] + max(0, rest) / real)
    assert found["seconds"] == pytest.approx(2100 / found["at_scale"])
    assert found["peak_gpu_bytes"] is None
    for word in ("model only", "end to end", "efficiency", "preparation", "what limits", "forecast"):
        assert word in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]


def test_what_limits_is_the_slowest(tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ForecastConfig(clip=clip, images=4, boxes=3, picture=(64, 48), rounds=1)
    monkeypatch.setattr(forecasting, "_writing", lambda *_: 1e-3)
    assert forecasting.forecast(config, tmp_path)["limit"] == "writing"
    rows = [product.rows for product in Catalog(tmp_path / "round 0").products() if product.whole]
    assert sorted(rows) == [4, 12, 12, 65]  # images, boxes, crops, classes


def test_the_disk_that_is_forecast_is_what_a_cache_takes(tmp_path: Path, clip: str) -> None:
    found = forecasting.forecast(
        ForecastConfig(clip=clip, images=400, boxes=20, picture=(48, 40), rounds=1, data_set=(400, 8_000)), tmp_path
    )
    whole = sum(
        product.bytes() for product in Catalog(tmp_path / "round 0").products() if product.level is not Level.CLASS
    )
    assert found["disk_bytes"] == pytest.approx(whole, rel=0.3)


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--picture", "640", "--picture 640: expected two whole numbers"),
        ("--forecast", "0,5", "--forecast 0,5: expected two"),
        ("--batch", "many", "--batch many: expected auto"),
        ("--batch", "0", "--batch 0: expected auto"),
        ("--workers", "-1", "--workers -1: expected auto, or a whole number from 0"),
        ("--crop-scales", "big", "--crop-scales big: expected numbers"),
    ],
)
def test_wrong_words(option: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=message):
        CliRunner().invoke(app, ["bench", "extract", option, text, "--folder", str(tmp_path)], catch_exceptions=False)
    assert not any(tmp_path.iterdir())
