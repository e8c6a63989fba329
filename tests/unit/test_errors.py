"""What ends a run is told before anything is closed, once; other ranks than the first say nothing but errors."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_klear import errors
from megatron_klear.errors import UserError, configure_logging, exit_on_error, told_at_once


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    """Errors configure the package's logger for the rank that a test says it is."""
    package = logging.getLogger(errors.__package__)
    level, handlers = package.level, list(package.handlers)
    yield
    package.setLevel(level)
    package.handlers[:] = handlers


@pytest.mark.parametrize("error", [UserError, ZeroDivisionError])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_error_is_told_before_what_is_round_it_is_closed_and_once(error, processes, monkeypatch, capsys):
    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    @contextmanager
    def slow_to_close():
        try:
            yield
        finally:
            told.append(capsys.readouterr().err)

    told: list[str] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises((Ended, SystemExit)) as ended, exit_on_error(), slow_to_close(), told_at_once():
        raise error("planted")
    assert ended.value.args == (1,)
    assert "error (rank 1)" in told[0]
    assert "planted" in told[0]
    assert ("Traceback" in told[0]) == (error is ZeroDivisionError)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "seen"), [("0", "a note\na fault\n"), ("3", "a fault\n")])
def test_messages_of_the_first_rank_and_errors_of_all_are_seen_once(rank, seen, monkeypatch):
    package = logging.getLogger(errors.__package__)
    out = io.StringIO()
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "level", logging.NOTSET)
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setenv("RANK", rank)
    configure_logging()
    configure_logging()
    logger = logging.getLogger(f"{errors.__package__}.data.store.test")
    logger.info("a note")
    logger.error("a fault")
    logging.getLogger(errors.__package__).setLevel(logging.NOTSET)  # drops what loggers remember of levels
    assert out.getvalue() == seen


def test_an_interruption_does_not_say_that_what_was_saved_is_lost(monkeypatch, capsys):
    """An evaluation writes each response as it comes, an ablation each run."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "is kept: start the same command again to go on" in capsys.readouterr().err
