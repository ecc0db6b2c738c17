"""Lines that stages say: where they go, and that nothing else takes them away."""

from __future__ import annotations

import logging
import logging.config

import pytest

from hdovd.core import LOGGER, is_printed, lines_to, log, quiet


def test_lines_go_to_the_innermost_writer_alone() -> None:
    outer, inner = list[str](), list[str]()
    with lines_to(outer.append):
        log("100 %")
        with lines_to(inner.append):
            log("inside")
        with quiet():
            log("unsaid")
            with lines_to(inner.append):
                log("unsaid too")
        log("after")
    log("nobody asked")
    assert (outer, inner) == (["100 %", "after"], ["inside"])
    assert not is_printed()


def test_a_library_that_sets_up_logging_neither_silences_nor_repeats_them(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, root = list[str](), logging.getLogger()
    monkeypatch.setattr(root, "handlers", [*root.handlers, logging.StreamHandler()])
    monkeypatch.setattr(root, "level", logging.INFO)
    with lines_to(found.append):
        logging.config.dictConfig({"version": 1, "incremental": False})
        assert LOGGER.disabled
        log("a line")
    assert found == ["a line"]
    assert not any(capfd.readouterr())
