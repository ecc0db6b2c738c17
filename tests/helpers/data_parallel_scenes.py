"""Three training steps in W processes over gloo, or in one: shares of the batch, an integer a process (`forked_group`).

Every process writes OUT/RANK.pt: losses and gradients of each step, and the state at the end. With SHARE... as one
number there is no process group. Run by test_distributed.py.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hdovd.config.recipe import load_recipe
from hdovd.data.targets import Targets
from hdovd.modeling.base import StepContext
from hdovd.modeling.distributed import divisor, gather_rows, mean_count
from hdovd.modeling.faster_rcnn.model import FasterRCNN

DIM, BASE, STEPS = 6, 3, 3
SETTINGS = (
    "input.short_side=64",
    "input.long_side=96",
    "detector.backbone.fpn_channels=8",
    "detector.rpn.anchor_sizes=[[8], [16], [32], [64]]",
    "detector.rpn.samples=16",
    "detector.rpn.pre_nms=30",
    "detector.rpn.post_nms=20",
    "detector.head.fc_channels=16",
    "detector.head.samples=32",
    "detector.head.canonical_size=32",
    "loss.instance.queue=19",
    "loss.image.queue=12",
    "pseudo_boxes.min_side=8.0",
    "pseudo_boxes.reliability_centre=0.1",
    "pseudo_boxes.reliability_width=0.5",
    "pseudo_boxes.reliability_scale=1.3",
    "train.precision=fp32",
    "detector.backbone.norm=frozen",
    "loss.extra.agree.use=data_parallel_scenes:Agree",
    "loss.extra.agree.weight=0.5",
)


class Agree(nn.Module):
    """A loss of the recipe's own, as docs/EXTENDING.md has it: divided by the RoIs of all processes."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)

    def forward(self, view: StepContext) -> Tensor:
        positive = view.box_of_roi >= 0
        distance = 1 - nn.functional.cosine_similarity(self.project(view.c[positive]), view.d, dim=1)
        return distance.sum() / divisor(positive.sum())


def unit(*shape: int, seed: int) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(rows, dim=-1)


def boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([60.0, 36.0])
    return torch.cat([corner, corner + 12 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 16], dim=1)


def global_batch(step: int) -> list[tuple[Tensor, Targets]]:
    """Five images. The second to fourth have no pseudo boxes, the last has no box at all; in step 2 only the first has
    any.
    """
    samples = []
    for i in range(5):
        seed = 100 * step + i
        base, pseudo = (0, 0) if i == 4 or (step == 2 and i) else (1 + i % 2, 2 if i == 0 else 0)
        targets = Targets(
            boxes(base, seed),
            (torch.arange(base) + i) % BASE,
            unit(base, DIM, seed=seed + 1000),
            boxes(pseudo, seed + 50),
            unit(pseudo, DIM, seed=seed + 2000),
            unit(pseudo, DIM, seed=seed + 3000),
            unit(DIM, seed=seed + 4000),
        )
        samples.append(
            (
                torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)),
                targets,
            )
        )
    return samples


def train(rank: int, shares: list[int], out: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # float32's rounding flips ReLUs, which hides small errors in the gradients
    torch.Tensor.float = torch.Tensor.double
    torch.manual_seed(0)
    model = FasterRCNN(load_recipe("demo", SETTINGS), DIM, initialise=False).double()
    nn.init.normal_(model.head.class_feature.weight, std=0.3)
    trained: nn.Module = model if len(shares) == 1 else DistributedDataParallel(model)
    torch.manual_seed(100 + rank)  # keys, not the global generator, decide
    optimizer = torch.optim.SGD(model.parameters(), 0.002, momentum=0.9)
    texts, first, steps = unit(BASE, DIM, seed=9), sum(shares[:rank]), []
    trained.train()
    for step in range(STEPS):
        own = global_batch(step)[first : first + shares[rank]]
        losses = trained(
            [image for image, _ in own],
            [targets for _, targets in own],
            texts,
            [50 * step + first + i for i in range(len(own))],
        )
        optimizer.zero_grad()
        sum(losses.values()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        steps.append({"losses": {name: loss.detach() for name, loss in losses.items()}, "gradients": gradients})
        optimizer.step()
    torch.save({"steps": steps, "state": model.state_dict()}, out / f"{rank}.pt")


def check_gathering(rank: int, world: int) -> None:
    """Rows in rank order; the mean over processes of the gradients is the gradient of the loss of all rows."""
    counts = [2, 0, 3][:world]
    everything = unit(sum(counts), DIM, seed=1)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)  # a parameter: the same in every process
    rows = everything[sum(counts[:rank]) :][: counts[rank]] * scale
    gathered = gather_rows(rows)
    assert torch.equal(gathered.detach(), everything)
    (gathered**3).sum().backward()
    mean = scale.grad.clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / world, 3 * (everything**3).sum()[None])
    assert gather_rows(torch.zeros(0, 4)).shape == (0, 4)
    count = torch.tensor(counts[rank])
    assert abs(mean_count(count).item() - sum(counts) / world) < 1e-6
    assert count.item() == counts[rank]


def work(rank: int, shares: list[int], out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=len(shares))
    check_gathering(rank, len(shares))
    train(rank, shares, out)
    dist.destroy_process_group()
