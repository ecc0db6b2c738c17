"""Losses of the same steps of training in bf16 autocast and in fp32, on a small drawn world with random weights.

    python benchmarks/precision.py --recipe ov-coco-faster-rcnn-r50 --steps 20 --set train.batch_size=2 --set
    input.short_side=96 \
                                   --set input.long_side=128 --set train.warmup_iterations=0 --set train.lr=0.001

Prints each loss of the first, the middle and the last step in both, and the largest relative difference of the summed
loss. On a CPU without bf16 of its own the results are those of bf16, and take many times as long.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from bench_train import calm
from side_by_side import prepare

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.data import DataPaths, load_protocol
from hdovd.modeling.base import build_detector
from hdovd.pipelines.common.device import team
from hdovd.pipelines.training.config import TrainConfig
from hdovd.pipelines.training.train import batches_of, loop_of, prepared, training_data


def losses_of(recipe: Recipe, folder: Path, device: str, steps: int) -> list[dict[str, float]]:
    """The weighted losses of every step, by name."""
    protocol = load_protocol(str(folder / "world" / "protocol.toml"))
    with team(device) as us:
        data = training_data(
            TrainConfig(data=DataPaths(folder / "world"), cache=folder / "cache", out=folder / "run", recipe=recipe),
            protocol,
        )
        texts = torch.from_numpy(data.class_embeddings(protocol.base)).to(us.device)
        torch.manual_seed(recipe.train.seed)
        model = prepared(build_detector(recipe, data.dim, initialise=False), recipe, us)
        calm(model)
        model.begin_epoch(recipe.pseudo_boxes.from_epoch)
        loop = loop_of(model, batches_of(data, us)[0], texts, recipe, us.device)
        loop.batches.seek(0, 0)
        model.train()
        found: list[dict[str, float]] = []
        for _, batch in zip(range(steps), loop.batches, strict=False):
            loop.take_step(batch, 0)
            found.append(loop.window.means(us.device))
            loop.window.rows.clear()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        settings = ["train.seed=0", "detector.backbone.weights=none", *asked.set]
        recipes = {
            precision: load_recipe(asked.recipe, [*settings, f"train.precision={precision}"]).with_reliability(
                0.2, 0.03, 1.0
            )
            for precision in ("fp32", "bf16")
        }
        fp32, bf16 = (losses_of(recipe, Path(place), asked.device, asked.steps) for recipe in recipes.values())
    print(f"{asked.recipe} {' '.join(asked.set)}, {len(fp32)} steps; fp32 / bf16")
    for step in sorted({0, len(fp32) // 2, len(fp32) - 1}):
        print(
            f"step {step + 1}: "
            + ", ".join(f"{name} {value:.4f} / {bf16[step][name]:.4f}" for name, value in fp32[step].items())
        )
    totals = [(sum(one.values()), sum(other.values())) for one, other in zip(fp32, bf16, strict=True)]
    print("largest relative difference of the sum: " + f"{max(abs(other / one - 1) for one, other in totals):.2%}")


if __name__ == "__main__":
    main()
