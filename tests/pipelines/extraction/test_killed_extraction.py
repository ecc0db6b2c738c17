"""An extraction that is killed, or has no room: what was finished is whole, and the same command makes it the cache of
an unbroken run.

The scenes are real processes (`killed_scenes`); they are played once, and these tests judge what was seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from forked_extractions import play
from killed_scenes import SCENES

from hdovd.pipelines.extraction.config import ExtractConfig


@pytest.fixture(scope="module")
def facts(extraction: Callable[..., ExtractConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return play(extraction(tmp_path_factory.mktemp("killed")), *SCENES)


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(facts: dict[str, Any]) -> None:
    seen = facts["killed_at_random"]
    assert seen["kills"] >= 6
    assert seen["kills"] > seen["early"]  # not all of them before anything was written
    assert not seen["damaged"]
    assert seen["same"] == seen["whole"] > 0


def test_killed_between_any_two_writes_it_goes_on_to_the_same_bytes(facts: dict[str, Any]) -> None:
    """While the cache is made, while a product is begun, and with a file half-written."""
    seen = facts["killed_at_a_write"]
    assert seen["kills"] >= 8
    assert min(seen["without_root"], seen["without_tables"], seen["with_partial"]) > 0
    assert not seen["damaged"]
    assert seen["same"]


def test_killed_while_it_tries_failed_images_again(facts: dict[str, Any]) -> None:
    """No record speaks of the bytes that were there before, and the last run leaves out no failed image."""
    seen = facts["killed_while_retrying"]
    assert seen["failed"] >= 6  # an image fails at two levels
    assert seen["kills"] >= 3
    assert not seen["damaged"]
    assert seen["code"] == 0, seen["printed"]
    assert seen["same"]


def test_a_killed_processs_loader_workers_hold_no_claims(facts: dict[str, Any]) -> None:
    seen = facts["killed_with_a_worker"]
    assert seen["code"] == -9
    assert seen["alive"] == 1  # the worker outlives its parent for some seconds
    assert seen["claims"] == seen["free"] >= 1
    assert not seen["damaged"]
    assert seen["again"] == 0
    assert seen["same"]


def test_a_file_that_may_not_grow_is_an_error_and_then_goes_on(facts: dict[str, Any]) -> None:
    seen = facts["too_long_a_file"]
    assert seen["code"] == 1
    _says_what_to_do(seen["printed"], "File too large")
    assert not seen["damaged"]
    assert seen["kept"] > 8  # tables of six products, texts, and a part at least
    assert seen["again"] == 0
    assert seen["same"]


def test_a_full_disk_is_an_error_and_room_lets_it_go_on(facts: dict[str, Any]) -> None:
    seen = facts["full_disk"]
    if "skipped" in seen:
        pytest.skip(seen["skipped"])
    first, second = seen["first"], seen["second"]
    assert first["code"] == 1
    _says_what_to_do(first["printed"], "No space left on device")
    assert not first["damaged"]
    assert 8 < first["kept"] < second["kept"]
    assert second["code"] == 0
    assert seen["same"]


def _says_what_to_do(printed: str, problem: str) -> None:
    message = printed[printed.index("error: ") :]
    assert problem in message
    assert "run the same command again" in message
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1
