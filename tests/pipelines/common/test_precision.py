"""What auto stands for, on devices that are told of: a CPU by its instruction sets, a GPU by what torch says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hdovd.config.recipe import load_recipe
from hdovd.core import HdovdError
from hdovd.pipelines.common import device as device_module
from hdovd.pipelines.common.device import choose, cpu_bf16, cpu_features, inference_precision, settled
from hdovd.pipelines.common.options import Precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SERVER = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}


@pytest.fixture(autouse=True)
def _not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HDOVD_PRECISION", raising=False)


@pytest.fixture(params=[False, True], ids=["without bf16", "with bf16"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(device_module, "native_bf16", lambda _: (request.param, "this one is so"))
    return bool(request.param)


@pytest.mark.parametrize(
    ("features", "capability", "limit", "expected", "why"),
    [
        (SERVER, "AVX512", "", True, "AVX-512-BF16 and AMX"),
        ({"avx512_bf16"}, "AVX512", "AVX512_CORE_BF16", True, "AVX-512-BF16"),
        (SERVER, "AVX2", "", False, "held to AVX2"),
        (SERVER, "AVX512", "avx2", False, "without bf16"),
        (SERVER, "DEFAULT", "", False, "held to DEFAULT"),
        ({"avx2", "fma"}, "AVX2", "", False, "no bf16 of its own (AVX2)"),
        ({"avx2", "avx512f"}, "AVX512", "", False, "no bf16 of its own (AVX512)"),
        ({"asimd", "bf16"}, "DEFAULT", "", True, "has bf16"),
        ({"asimd"}, "DEFAULT", "", False, "no bf16"),
        (None, "DEFAULT", "", False, "does not say"),
    ],
)
def test_cpus(features: set[str] | None, capability: str, limit: str, expected: bool, why: str) -> None:
    native, said = cpu_bf16(features, capability, limit)
    assert native is expected
    assert why in said


def test_the_features_of_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert cpu_features(file) is None
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\nbugs\t\t: x\n")
    assert cpu_features(file) == {"fpu", "avx2", "amx_bf16"}
    file.write_text("Features\t: asimd bf16\n")
    assert cpu_features(file) == {"asimd", "bf16"}
    file.write_text("processor\t: 0\n")
    assert cpu_features(file) is None


@pytest.mark.parametrize(
    ("device", "training", "without"),
    [(CPU, True, "fp32"), (CPU, False, "fp32"), (GPU, True, "fp32"), (GPU, False, "fp16")],
)
def test_the_table(device: torch.device, training: bool, without: str, native: bool) -> None:
    precision, line = choose("auto", device, training=training)
    assert precision == ("bf16" if native else without)
    assert line == f"precision: {precision}, chosen: this one is so"


def test_what_is_there_keeps_its_own(native: bool) -> None:
    for own in (Precision.FP32, Precision.BF16):
        precision, line = choose("auto", CPU, training=False, own=own, whose="the cache's")
        assert precision is own
        assert line.startswith(f"precision: {own}, the cache's own")
    assert choose("fp32", CPU, training=False, own="bf16")[0] is Precision.FP32


def test_bf16_that_is_emulated_names_its_cost(native: bool) -> None:
    asked, asked_line = choose("bf16", CPU, training=True)
    assert asked is Precision.BF16
    assert ("slower than fp32" in asked_line) is not native
    _, kept_line = choose("auto", CPU, training=True, own="bf16", whose="the run's")
    assert ("the run's own" in kept_line, "slower" in kept_line) == (True, not native)


def test_the_variable_of_clusters(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDOVD_PRECISION", "fp32")
    assert choose("auto", GPU, training=False)[1] == "precision: fp32, by HDOVD_PRECISION"
    assert choose("bf16", GPU, training=False)[0] is Precision.BF16
    assert choose("auto", GPU, training=False, own="fp16")[0] is Precision.FP16
    monkeypatch.setenv("HDOVD_PRECISION", "half")
    with pytest.raises(HdovdError, match=r"HDOVD_PRECISION=half: expected fp32, bf16 or fp16"):
        choose("auto", GPU, training=False)


def test_fp16_is_for_gpus(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("fp16", GPU, training=False)[1] == ""
    with pytest.raises(HdovdError, match=r"--precision fp16 needs a GPU: give --device cuda, or --precision fp32"):
        choose("fp16", CPU, training=False)
    with pytest.raises(HdovdError, match=r"precision fp16 \(the cache's own\) needs a GPU"):
        choose("auto", CPU, training=False, own="fp16", whose="the cache's")
    monkeypatch.setenv("HDOVD_PRECISION", "fp16")
    for device in (CPU, GPU):
        with pytest.raises(HdovdError, match="fp16"):
            choose("auto", device, training=True)


def test_a_recipe_is_written_down_settled(native: bool) -> None:
    recipe, line = settled(load_recipe("demo"), CPU)
    assert recipe.train.precision == ("bf16" if native else "fp32")
    assert "chosen" in line
    again, line = settled(recipe, CPU, "fp32", "the run's")
    assert again == recipe
    assert line == ""


def test_inference(native: bool) -> None:
    found = {
        (device.type, name): inference_precision(device, load_recipe("demo", [f"train.precision={name}"]))
        for device in (CPU, GPU)
        for name in ("fp32", "bf16")
    }
    fast = "bf16" if native else "fp32"
    assert found == {("cpu", "fp32"): "fp32", ("cpu", "bf16"): "fp32", ("cuda", "fp32"): "fp32", ("cuda", "bf16"): fast}
