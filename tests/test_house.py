"""The rooms: each imports only from rooms that stand before it in the list below, none is overfull, and no files import
in a circle.
"""

from __future__ import annotations

import ast
from collections import Counter

from house import between_rooms, circles, imports, modules, room

MOST_MODULES = 22
ORDER = [
    f"hdovd.{name}"
    for name in (
        "core",
        "cache",
        "config",
        "data.forms",
        "data",
        "evaluation",
        "modeling",
        "modeling.losses",
        "modeling.levels",
        "modeling.backbones",
        "modeling.faster_rcnn",
        "modeling.queries",
        "modeling.adamixer",
        "modeling.rtdetr",
        "modeling.proposals",
        "modeling.export",
        "pipelines",
        "pipelines.common",
        "pipelines.dataloading",
        "pipelines.teachers",
        "pipelines.embedding",
        "pipelines.nouns",
        "pipelines.proposal_files",
        "pipelines.runs",
        "pipelines.extraction",
        "pipelines.label_export",
        "pipelines.calibration",
        "pipelines.evaluation",
        "pipelines.training",
        "pipelines.proposals",
        "pipelines.relabelling",
        "pipelines.detection",
        "pipelines.adaptation",
        "pipelines.search",
        "pipelines.serve",
        "pipelines.transfer",
        "pipelines.export",
        "pipelines.ablation",
        "pipelines.audit",
        "pipelines.cache_tools",
        "pipelines.hub",
        "pipelines.report",
        "pipelines.demo",
        "cli",
        "cli.groups",
        "cli.exchange",
    )
] + ["hdovd"]


def test_every_room_has_its_place() -> None:
    assert sorted(ORDER) == sorted(set(map(room, modules())))


def test_rooms_import_only_from_rooms_before_them() -> None:
    place = {name: number for number, name in enumerate(ORDER)}
    assert [
        line for (of, target), lines in between_rooms().items() if place[target] >= place[of] for line in lines
    ] == []


def test_no_files_import_in_a_circle() -> None:
    assert circles({name: {target for target in imports(name) if target != name} for name in modules()}) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"], ["c", "b"]]


def test_no_room_is_overfull() -> None:
    assert {name: count for name, count in Counter(map(room, modules())).items() if count > MOST_MODULES} == {}


def test_names_that_a_room_hands_out_are_taken_from_it() -> None:
    """Where `hdovd.data` names Split, no other room says `hdovd.data.coco`."""
    known = modules()
    handed_out = {
        (package, alias.name): node.module
        for package in known
        if package in ("hdovd.cache", "hdovd.data", "hdovd.pipelines.runs")
        for node in known[package].body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {("hdovd.cache", "Level"), ("hdovd.data", "Split")} <= handed_out.keys()
    assert [
        f"{name}: {alias.name} of {node.module}"
        for name, tree in known.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        for package in [node.module.rpartition(".")[0]]
        if room(name) != package and handed_out.get((package, alias.name)) == node.module
    ] == []
