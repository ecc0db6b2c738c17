"""Two steps of a small detector made of queries in W processes over gloo, or in one: shares of the batch, an
integer a process (`forked_group`).

Every process writes OUT/RANK.pt: losses of both steps, gradients of the second, the state. Run by
test_queries_distributed.py.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from adamixer_scenes import BASE, pictures, targets, unit

from hdovd.data.targets import Targets
from hdovd.modeling.batching import batch_images
from hdovd.modeling.queries.detector import QueryDetector

IMAGES = pictures(*[(96, 128)] * 4)
PSEUDO = [[30.0, 5.0, 80.0, 60.0], [0.0, 40.0, 50.0, 90.0]]


def global_batch(model: QueryDetector) -> list[Targets]:
    """Base boxes near predictions, so that there are pairs; the third picture has no box, the last no pseudo box."""
    with torch.no_grad():
        look = model.find(batch_images(IMAGES, model.recipe.input)[0])
    aside = torch.tensor(
        [0.7, -0.9, 0.6, 1.1]
    )  # pixels: where a prediction is its box, the L1 loss has no gradient to compare
    found = [(boxes[:3] + aside).tolist() for boxes in look.boxes[-1]]
    rows = [
        targets(found[0], PSEUDO, [1, 3, 1], 10),
        targets(found[1][:1], PSEUDO[:1], [0], 20),
        targets([], [], [], 30),
        targets(found[3][:2], [], [2, 3], 40),
    ]
    return [
        Targets(
            *(
                value.double() if value.is_floating_point() else value
                for value in (getattr(t, name) for name in t.__slots__)
                if value is not None
            )
        )
        for t in rows
    ]


def train(detector: Callable[..., QueryDetector], rank: int, shares: list[int], out: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # float32's rounding flips ReLUs, which hides small errors in the gradients
    torch.Tensor.float = torch.Tensor.double
    model = (
        detector("detector.backbone.norm=frozen", "loss.instance.queue=9", "loss.image.queue=6", initialise=False)
        .double()
        .train()
    )
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    batch, steps = global_batch(model), []
    for _ in range(2):
        model.zero_grad()
        losses = model(IMAGES[own], batch[own], unit(BASE, model.dim, seed=1).double(), list(range(4))[own])
        sum(losses.values()).backward()
        steps.append({name: loss.detach() for name, loss in losses.items()})
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    torch.save({"steps": steps, "gradients": gradients, "state": model.state_dict()}, out / f"{rank}.pt")


def work(detector: Callable[..., QueryDetector], rank: int, shares: list[int], out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=len(shares))
    train(detector, rank, shares, out)
    dist.destroy_process_group()
