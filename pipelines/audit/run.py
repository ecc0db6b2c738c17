"""The audit's checks of a training run: its cache, what its backbone started from, what its reliability weights were
fitted on.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError, shorten
from hdovd.core.text_files import read_toml
from hdovd.pipelines.audit.inputs import Audited
from hdovd.pipelines.audit.report import Check, Findings, Verdict


def judge_record(audited: Audited, made_by: dict[str, Any], whose: str, found: Findings) -> str:
    """Adds to `found` what the record says of other than base boxes of training pictures, and what it does not say.

    Args:
        whose: the record, in words.

    Returns:
        What to say where nothing was found.
    """
    protocol, total = audited.protocol, 0
    counts, base = made_by.get("training_boxes"), _base_names(made_by)
    if isinstance(counts, dict) and all(isinstance(count, int) for count in counts.values()):
        total = sum(counts.values())
        found.leaks += [
            f"{whose}: trained on {count:,d} boxes of {own!r}, which is "
            f"{'novel' if own in protocol.novel else 'no base class'}"
            for own, count in counts.items()
            if count and own not in protocol.base
        ]
    else:
        found.unknown.append(f"{whose} does not say on how many boxes of which class (training_boxes)")
    if base is not None:
        found.leaks += [
            f"{whose}: its protocol has {own!r} as base, {protocol.name} has not"
            for own in base
            if own not in protocol.base
        ]
    else:
        found.unknown.append(f"{whose} does not say which classes were base")
    _judge_annotations(audited, made_by.get("annotations"), whose, found)
    return f"{made_by.get('detector', 'a network')} trained on {total:,d} boxes, all of base classes"


def _judge_annotations(audited: Audited, annotations: Any, whose: str, found: Findings) -> None:
    """A file is known by its sha256; other pictures than those of --data are neither passed nor a leak."""
    recorded = annotations.get("sha256") if isinstance(annotations, dict) else None
    if not isinstance(recorded, str):
        found.unknown.append(f"{whose} does not say which annotation file was trained on (annotations.sha256)")
    elif audited.val is not None and recorded == audited.val.sha256():
        found.leaks.append(f"{whose}: trained on {audited.val.file}: those are the test pictures")
    elif recorded != audited.truth.sha256():
        file = annotations.get("file", "a file")
        beside = f" nor {audited.val.file}" if audited.val is not None else ", and no validation file was given"
        found.unknown.append(
            f"{whose}: trained on {file} (sha256 {recorded[:12]}), which is not {audited.truth.file}{beside}: whether "
            f"it saw test pictures is not known; give that file with --annotations, or train with this one"
        )


def _base_names(made_by: dict[str, Any]) -> list[str] | None:
    protocol = made_by.get("protocol")
    base = protocol.get("base") if isinstance(protocol, dict) else None
    return base if isinstance(base, list) else None


RECIPE = "the recipe"  # as `calibration.with_reliability` names numbers that the recipe gives


def check_run_cache(audited: Audited) -> Check:
    """The run was trained on the products of the set that is audited."""
    found = Findings("run: cache")
    if audited.run is None:
        return found.cannot(audited.missing["run"])
    if "imported" in audited.run:
        return found.cannot(
            f"{audited.run_path} was imported from {_file_of(audited.run)}: what it was trained on is not recorded"
        )
    recorded = audited.run.get("cache")
    levels = recorded.get("levels") if isinstance(recorded, dict) else None
    if not isinstance(levels, dict) or not all(isinstance(entry, dict) and "key" in entry for entry in levels.values()):
        return found.cannot("run.json does not say which cache the run read")
    assert isinstance(recorded, dict)
    for level in Level:
        theirs = levels.get(str(level), {}).get("key")
        ours = audited.cache.key(level) if level in audited.cache.levels() else None
        if theirs != ours:
            found.unknown.append(
                f"{audited.run_path} was trained on {level} {theirs or '(none)'}, this set has {ours or '(none)'}: "
                f"what "
                f"it read was not audited; audit {recorded.get('path', 'the cache that it read')}, or another set of "
                f"it with --features"
            )
    return found.check(f"{audited.run_path} was trained on this cache: {len(levels)} levels with the same keys")


def _file_of(run: dict[str, Any]) -> str:
    imported = run["imported"]
    return str(imported.get("file", "a checkpoint")) if isinstance(imported, dict) else "a checkpoint"


def check_backbone(audited: Audited) -> Check:
    """The run's backbone started from weights that saw no novel box and no test picture, as their file says."""
    found = Findings("run: backbone")
    if audited.run_path is None:
        return found.cannot(audited.missing["run"])
    if audited.run is not None and "imported" in audited.run:
        return found.cannot(
            f"{audited.run_path} was imported from {_file_of(audited.run)}, which does not say what its backbone "
            "started from"
        )
    if audited.run is not None and (init := audited.run.get("init")):
        before = init.get("run") if isinstance(init, dict) else "another run"
        return found.cannot(
            f"{audited.run_path} began with the weights of {before}: what those were trained on, its own audit says"
        )
    config = audited.run_path / "config.toml"
    try:
        backbone = read_toml(config, "recipe")["detector"]["backbone"]
        network, weights = str(backbone["name"]), str(backbone["weights"])
    except (HdovdError, KeyError, TypeError) as error:
        return found.cannot(f"{config} does not say what the backbone started from ({error!r})")
    if weights not in ("auto", "none"):
        made_by = _record_of(Path(weights), found)
        fine = judge_record(audited, made_by, weights, found) if made_by is not None else ""
        return found.check(f"{weights}: {fine}", {"made_by": made_by})
    if ":" in network and not network.startswith(("timm:", "torchvision:")):
        found.unknown.append(f"{network} is code outside of hdovd: which weights it starts from is not known")
    return found.check(
        f"{network} started from random weights"
        if weights == "none"
        else f"{network} started from the weights that {'timm' if network.startswith('timm:') else 'torchvision'} "
        f"publishes"
    )


def _record_of(weights: Path, found: Findings) -> dict[str, Any] | None:
    """What made a file of backbone weights; if it does not say, None, and `found` says why."""
    if not weights.is_file():
        found.unknown.append(
            f"the backbone started from {weights}, which is not here: what made it is not known; run the audit where "
            f"it is (a relative path counts from the folder that hdovd train ran in)"
        )
        return None
    try:
        with safe_open(weights, "np") as tensors:
            made_by = json.loads((tensors.metadata() or {}).get("made_by", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):  # a .pth, or damaged: neither has a record
        made_by = None
    if not isinstance(made_by, dict):
        found.unknown.append(
            f"the backbone started from {weights}, which does not say what made it: whether that saw novel boxes or "
            f"test pictures is not known (files of hdovd propose --backbone-out say so)"
        )
        return None
    return made_by


def check_calibration(audited: Audited) -> Check:
    """The reliability weights were fitted on base names and base boxes alone."""
    found = Findings("calibration")
    if audited.run is None:
        return found.cannot(audited.missing["run"])
    record = audited.run.get("reliability")
    if not record:
        return found.check("no calibration recorded: the weights are the recipe's numbers, or none are used")
    record = record if isinstance(record, dict) else {}
    source, fitted_on = str(record.get("source", "")), record.get("fitted_on")
    if source and fitted_on is None and not source.startswith("calibration"):
        if source == RECIPE:
            return Check(
                found.name,
                Verdict.REPORT,
                "the weights are the recipe's numbers: who chose them, and by what, is not recorded",
            )
        return found.check(f"no calibration: the weights are of {source}")
    classes: Any = fitted_on.get("classes") if isinstance(fitted_on, dict) else None
    products: Any = fitted_on.get("levels") if isinstance(fitted_on, dict) else None
    if not isinstance(classes, list) or not isinstance(products, dict):
        return found.cannot("run.json has a calibration that does not say which classes it was fitted on")
    found.leaks += [
        f"fitted on the name {own!r}, which is {'novel' if own in audited.protocol.novel else 'no base class'}"
        for own in classes
        if own not in audited.protocol.base
    ]
    levels, others = audited.cache.levels(), []
    for level in (Level.INSTANCE, Level.CLASS):
        key, ours = products.get(str(level)), audited.cache.key(level) if level in levels else None
        if key is None:
            found.unknown.append(f"the calibration does not say which {level} product it was fitted on")
        elif key != ours:
            others.append(f"{level} {key}")
    if others:
        found.unknown.append(
            f"it was fitted on other products than this cache's ({shorten(list(others))}): audit the cache that has "
            f"them"
        )
    return found.check(f"fitted on the names of {len(classes)} base classes and this cache's base boxes")
