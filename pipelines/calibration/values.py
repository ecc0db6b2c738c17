"""Which values the reliability weight of a run has: a calibration's, the recipe's numbers, or "auto" for known models
(METHOD section 2).

What the weight depends on is how the cosine of a crop and its label comes
about: the CLIP, what it sees of a box, the prompts of the nouns, and how many nouns make a label. Neither images nor
names are part of that, so a calibration holds for every set that was made in the same way (`LabelOrigin.way`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from hdovd.cache import KeyInputs, Level, require_same
from hdovd.config.detector import AUTO
from hdovd.core import HdovdError, log, shorten
from hdovd.core.text_files import read_toml

if TYPE_CHECKING:
    from hdovd.cache.reader import FeatureCache
    from hdovd.config.recipe import Recipe

VALUES = ("centre", "width", "scale")
CLIPS = {
    "ViT-B/32": ("ViT-B-32", "hf-hub:timm/vit_base_patch32_clip_224.openai"),
    "RN50": ("RN50", "hf-hub:timm/resnet50_clip.openai"),
}
HAND_WRITTEN, LEARNED = "hand-written", "learned"
KNOWN = {
    ("ViT-B/32", HAND_WRITTEN): (0.25, 0.026, 1.0),
    ("RN50", HAND_WRITTEN): (0.20, 0.03, 1.0),
    ("ViT-B/32", LEARNED): (0.31, 0.026, 1.3),
}
NOT_THE_WAY = {"schema_version", "images", "boxes", "names", "tokens", "synonyms"}  # of the inputs of levels


@dataclass(frozen=True, slots=True)
class LabelOrigin:
    """The features that training reads. `url`: in messages. `made_with`: the instance level's. `dim`: D. `fitted`: the
    set's own weight of labels, empty if it has none.
    """

    url: str
    inputs: dict[Level, KeyInputs]
    made_with: dict[str, Any]
    dim: int
    fitted: dict[str, Any] = field(default_factory=dict)

    def way(self) -> KeyInputs:
        """What the cosine of a crop and its label depends on; of a set without nouns, the classes' prompts stand for
        theirs.
        """
        texts = self.inputs[Level.NOUN if Level.NOUN in self.inputs else Level.CLASS]
        rule = self.inputs.get(Level.PSEUDO_LABEL, {})
        return {
            "crops": _without(self.inputs[Level.INSTANCE], NOT_THE_WAY),
            "texts": _without(texts, {*NOT_THE_WAY, "content"}),
            "labels": {name: rule[name] for name in ("top_k", "temperature", "choice") if name in rule},
        }

    def known(self) -> tuple[str, str] | None:
        """The row of METHOD's table that they are of, or None. A dense teacher, and labels of several nouns, are in no
        row.
        """
        instance, nouns = self.inputs.get(Level.INSTANCE, {}), self.inputs.get(Level.NOUN, {})
        if (
            instance.get("clip", {}).get("format") == "hd-ovd" and self.dim == 512
        ):  # the authors' own: ViT-B/32 and DetPro prompts
            return "ViT-B/32", LEARNED
        if (
            "crop" not in instance
            or "templates" not in nouns
            or instance["clip"].get("activation") != "quickgelu"
            or "top_k" in self.way()["labels"]
        ):
            return None
        name, tag = str(self.made_with.get("clip")), self.made_with.get("weights") or self.made_with.get("pretrained")
        plain = name.removesuffix("-quickgelu") if tag == "openai" else ""
        return next(
            ((clip, HAND_WRITTEN) for clip, known in CLIPS.items() if plain == known[0] or name == known[1]), None
        )


def origin_of(cache: FeatureCache) -> LabelOrigin:
    """Raises HdovdError if the set has no crops."""
    return LabelOrigin(
        cache.url,
        {level: cache.key_inputs(level) for level in cache.levels()},
        dict(cache.product(Level.INSTANCE).attributes["made_with"]),
        cache.dim,
        cache.set.label_weights,
    )


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `hdovd calibrate` found. `fitted_on`: url, features, levels (keys), way, classes and more; JSON values."""

    centre: float
    width: float
    scale: float
    fitted_on: dict[str, Any]
    found: dict[str, Any]

    def to_toml(self) -> str:
        return (
            "# Written by hdovd calibrate; for hdovd train --calibration. w = scale * sigmoid((cos(v, u) - centre) / "
            "width)\n"
            + tomli_w.dumps(
                {
                    "pseudo_boxes": {f"reliability_{name}": getattr(self, name) for name in VALUES},
                    "found": self.found,
                    "fitted_on": self.fitted_on,
                }
            )
        )

    def settings(self) -> tuple[str, ...]:
        """As of --set."""
        return tuple(f"pseudo_boxes.reliability_{name}={getattr(self, name)!r}" for name in VALUES)

    def require_fits(self, origin: LabelOrigin, base: Sequence[str], file: Path) -> None:
        """Raises HdovdError if the features were made in another way than those that it was fitted on, or if it was
        fitted on boxes of classes that are not `base`.
        """
        if novel := [name for name in self.fitted_on.get("classes", ()) if name not in base]:
            raise HdovdError(
                f"--calibration {file} was fitted on boxes of {shorten(novel)}, which the protocol does not call base: "
                f"it would give novel classes away. Fit one with this protocol: hdovd calibrate --cache {origin.url}"
            )
        require_same(
            self.fitted_on["way"],
            origin.way(),
            f"--calibration {file} was fitted on set {self.fitted_on['features']} of {self.fitted_on['cache']}, "
            f"which was made in another way than the features of {origin.url}",
            f"Fit one to them: hdovd calibrate --cache {origin.url}",
            sides=("fitted on", "these features have"),
        )


def read_calibration(file: Path) -> Calibration:
    """Raises HdovdError if it is none."""
    try:
        tree = read_toml(file, "--calibration")
        centre, width, scale = numbers = [float(tree["pseudo_boxes"][f"reliability_{name}"]) for name in VALUES]
        fitted_on, found = tree["fitted_on"], dict(tree.get("found", {}))
        if [type(fitted_on[key]) for key in ("way", "cache", "features")] != [dict, str, str]:
            raise TypeError("fitted_on")
        if not (all(abs(number) < float("inf") for number in numbers) and width > 0 and scale > 0):
            raise ValueError(f"centre, width and scale are {numbers}, expected finite numbers, width and scale above 0")
    except (HdovdError, ValueError, OverflowError, KeyError, TypeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise HdovdError(
            f"--calibration {file} is no calibration ({what}): hdovd calibrate --cache CACHE writes one, "
            f"calibration.toml unless --out says otherwise"
        ) from error
    return Calibration(centre, width, scale, fitted_on, found)


def with_reliability(
    recipe: Recipe, origin: Callable[[], LabelOrigin], calibration: Path | None, base: Sequence[str]
) -> tuple[Recipe, Recipe, dict[str, Any]]:
    """The recipe to write down, the one to train with, whose values are numbers, and what to record of where they are
    from.

    A recipe that says auto is written down so, as with its other automatic values. `base`: the classes that may be
    known of. Raises HdovdError for a calibration of other features or classes, and for auto with a CLIP that is not
    known.
    """
    if calibration is not None:
        found = read_calibration(calibration)
        found.require_fits(origin(), base, calibration)
        recipe = recipe.with_reliability(found.centre, found.width, found.scale)
        about = {"file": str(calibration.absolute()), "fitted_on": found.fitted_on, "found": found.found}
        return recipe, recipe, _record(recipe, f"calibration {calibration}", **about)
    given = [getattr(recipe.pseudo_boxes, f"reliability_{name}") for name in VALUES]
    if not recipe.loss.class_.enabled:
        return recipe, recipe, {}
    if AUTO not in given:
        return recipe, recipe, _record(recipe, "the recipe")
    row, fitted = origin().known(), origin().fitted
    if row is None and not fitted:
        rows = ", ".join(f"{clip} with {prompts} prompts" for clip, prompts in KNOWN)
        raise HdovdError(
            f'pseudo_boxes.reliability_... = "auto" knows crops by OpenAI\'s CLIPs, {rows}, and {origin().url} is of '
            f"none of them, nor has it a weight of its own. Fit the values to it: hdovd calibrate --cache "
            f"{origin().url} --out calibration.toml, then hdovd train --calibration calibration.toml"
        )
    automatic = KNOWN[row] if row else [fitted[name] for name in VALUES]
    used = recipe.with_reliability(*(auto if own == AUTO else own for own, auto in zip(given, automatic, strict=True)))
    source = (
        f"auto: METHOD section 2, CLIP {row[0]}, {row[1]} prompts" if row else "auto: fitted to the set's base boxes"
    )
    log(
        f"reliability of pseudo labels: centre {used.pseudo_boxes.reliability_centre}, width "
        f"{used.pseudo_boxes.reliability_width}, scale {used.pseudo_boxes.reliability_scale} ({source})"
    )
    return recipe, used, _record(used, source)


def _record(recipe: Recipe, source: str, **about: Any) -> dict[str, Any]:
    return {"reliability": dict(zip(VALUES, recipe.pseudo_boxes.reliability, strict=True), source=source, **about)}


def _without(tree: KeyInputs, left_out: Collection[str]) -> KeyInputs:
    """Without these, and without what is not set, at any depth, which TOML has no word for."""
    return {
        name: _without(value, ()) if isinstance(value, dict) else value
        for name, value in tree.items()
        if value is not None and name not in left_out
    }
