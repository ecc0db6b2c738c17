"""Several processes train a detector made of queries as one does (METHOD section 10): losses, gradients, memories and
moving means.
"""

from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import adamixer_scenes
import pytest
import query_processes
import rtdetr_scenes
import torch
from forked_group import played


@pytest.mark.parametrize("several", [[1, 3], [2, 1, 1]], ids=["two", "three, one without any box"])
@pytest.mark.parametrize("scenes", [adamixer_scenes, rtdetr_scenes], ids=lambda scenes: scenes.__name__)
def test_several_processes_are_one(scenes: ModuleType, several: list[int], tmp_path: Path) -> None:
    """In float64; counts are float32, so to 1e-6 of a tensor's largest value (and of the largest gradient)."""
    scene = SimpleNamespace(
        train=partial(query_processes.train, scenes.detector), work=partial(query_processes.work, scenes.detector)
    )
    (alone,), together = (played(scene, tmp_path / str(len(shares)), shares) for shares in ([4], several))
    assert all(loss > 0 for loss in alone["steps"][1].values())
    for step, losses in enumerate(alone["steps"]):
        for name, loss in losses.items():
            found = torch.stack([one["steps"][step][name] for one in together]).mean()
            assert abs(found - loss) <= 1e-6 * loss, (step, name)
    largest = max(float(g.abs().max()) for g in alone["gradients"].values())
    for name, gradient in alone["gradients"].items():
        found = torch.stack([one["gradients"][name] for one in together]).mean(dim=0)
        assert float((found - gradient).abs().max()) <= 1e-6 * largest, name
    for one in together:
        for name, value in alone["state"].items():
            torch.testing.assert_close(one["state"][name], value, rtol=1e-6, atol=1e-6, msg=name)
