"""The audit's checks of a training run: the cache that it read, and what its reliability weights were fitted on. Called by `audit`."""

from __future__ import annotations

from typing import Any

from hdovd.cache.schema import Level
from hdovd.errors import shorten
from hdovd.pipelines.audit_inputs import Audited
from hdovd.pipelines.audit_report import Check, Findings


def check_run_cache(audited: Audited) -> Check:
    """The run was trained on the products of the set that is audited."""
    found, name = Findings(), "run: cache"
    if audited.run is None:
        found.unknown.append(audited.missing["run"])
        return found.check(name, "")
    recorded = audited.run.get("cache")
    levels = recorded.get("levels") if isinstance(recorded, dict) else None
    if not isinstance(levels, dict) or not all(isinstance(entry, dict) and "key" in entry for entry in levels.values()):
        found.unknown.append("run.json does not say which cache the run read")
        return found.check(name, "")
    assert isinstance(recorded, dict)
    for level in Level:
        theirs = levels.get(str(level), {}).get("key")
        ours = audited.cache.key(level) if level in audited.cache.levels() else None
        if theirs != ours:
            found.leaks.append(f"{audited.run_path} was trained on {level} {theirs or '(none)'}, this set has {ours or '(none)'}: audit "
                               f"{recorded.get('path', 'the cache that it read')}, or another set of it with --features")
    return found.check(name, f"{audited.run_path} was trained on this cache: {len(levels)} levels with the same keys")


def check_calibration(audited: Audited) -> Check:
    """The reliability weights were fitted on base names and base boxes alone."""
    found, name = Findings(), "calibration"
    if audited.run is None:
        found.unknown.append(audited.missing["run"])
        return found.check(name, "")
    record = audited.run.get("reliability")
    if not record:
        return found.check(name, "no calibration recorded: the weights are the recipe's numbers, or none are used")
    record = record if isinstance(record, dict) else {}
    source, fitted_on = str(record.get("source", "")), record.get("fitted_on")
    if source and fitted_on is None and not source.startswith("calibration"):
        return found.check(name, f"no calibration: the weights are of {source}")
    classes: Any = fitted_on.get("classes") if isinstance(fitted_on, dict) else None
    products: Any = fitted_on.get("levels") if isinstance(fitted_on, dict) else None
    if not isinstance(classes, list) or not isinstance(products, dict):
        found.unknown.append("run.json has a calibration that does not say which classes it was fitted on")
        return found.check(name, "")
    found.leaks += [f"fitted on the name {own!r}, which is {'novel' if own in audited.protocol.novel else 'no base class'}"
                    for own in classes if own not in audited.protocol.base]
    levels, others = audited.cache.levels(), []
    for level in (Level.INSTANCE, Level.CLASS):
        key, ours = products.get(str(level)), audited.cache.key(level) if level in levels else None
        if key is None:
            found.unknown.append(f"the calibration does not say which {level} product it was fitted on")
        elif key != ours:
            others.append(f"{level} {key}")
    if others:
        found.unknown.append(f"it was fitted on other products than this cache's ({shorten(list(others))}): audit the cache that has them")
    return found.check(name, f"fitted on the names of {len(classes)} base classes and this cache's base boxes")
