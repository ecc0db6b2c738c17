"""Losses that a recipe adds: a section [loss.extra.NAME] each. docs/EXTENDING.md shows one.

The contract: `use` names a class of torch.nn.Module, built as MyLoss(dim=D, channels=C, **options) with D the embedding
size, C the pyramid's channels and options all keys of the section but `use` and `weight`; called as loss(view) with a
`StepContext`, it returns a scalar. The detector adds `weight` times it to its losses as NAME. Its state is in the
checkpoint.
"""

from torch import Tensor, nn

from hdovd.config.plugins import resolve_class
from hdovd.config.recipe import ExtraLossConfig
from hdovd.core.errors import HdovdError
from hdovd.modeling.step_context import StepContext

OWN_NAMES = (
    "rpn_objectness",
    "rpn_box",
    "classification",
    "box",
    "instance_alignment",
    "instance_relation",
    "image_alignment",
    "rpn_cls",
    "rpn_aux_cls",
    "rpn_aux_box",
    "objectness",
    "giou",
    "text_alignment",
    "text_relation",  # AdaMixer's
    "step",
    "epoch",
    "lr",
    "images_per_s",
    "data_wait",
    "memory_gb",
)  # losses, and what the log has beside them


class ExtraLosses(nn.Module):
    """The losses of a recipe's loss.extra sections, by name. Raises HdovdError naming the section that does not fit the
    contract.
    """

    def __init__(self, configs: dict[str, ExtraLossConfig], dim: int, channels: int) -> None:
        super().__init__()
        self.weights = {name: config.weight for name, config in configs.items()}
        self.parts = nn.ModuleDict({name: _build(name, config, dim, channels) for name, config in configs.items()})

    def forward(self, view: StepContext) -> dict[str, Tensor]:
        losses = {}
        for name, part in self.parts.items():
            loss = part(view)
            if not isinstance(loss, Tensor) or loss.shape != ():
                found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise HdovdError(
                    f"loss.extra.{name}: {type(part).__name__}.forward: expected a scalar tensor (shape ()), found "
                    f"{found}"
                )
            losses[name] = self.weights[name] * loss.float()  # bfloat16 under autocast
        return losses


def _build(name: str, config: ExtraLossConfig, dim: int, channels: int) -> nn.Module:
    section = f"loss.extra.{name}"
    if name in OWN_NAMES or name.startswith("val_"):
        raise HdovdError(
            f"{section}: the log has a column of that name: choose another than {', '.join(OWN_NAMES)} and val_..."
        )
    kind = resolve_class(config.use, f"{section}.use", nn.Module, "torch.nn.Module")
    try:
        return kind(dim=dim, channels=channels, **config.options)
    except TypeError as error:
        raise HdovdError(
            f"{section}: {config.use} is built with dim, channels and the section's other keys "
            f"({', '.join(config.options) or 'none'}): {error}"
        ) from error
