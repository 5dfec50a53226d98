"""Progress without a terminal, and logging of non-main processes."""

import itertools
import logging

import pytest

from mae_jax.utils import console


@pytest.fixture
def restored_logging():
    loggers = [logging.getLogger(name) for name in ("mae_jax", "mae_jax.run")]
    before = [(log.level, log.handlers, log.propagate) for log in loggers]
    yield
    for log, (level, handlers, propagate) in zip(loggers, before):
        log.setLevel(level)
        log.handlers, log.propagate = handlers, propagate
    console.console.quiet = False


def test_progress_is_logged_at_intervals(caplog, monkeypatch):
    monkeypatch.setattr(console.log, "propagate", True)
    monkeypatch.setattr(console.log, "handlers", [])
    caplog.set_level("INFO", logger="mae_jax")
    seconds = itertools.count(step=console.LOG_INTERVAL_S / 2)
    batches = [8] * 4
    passed = console.progress(batches, 40, count=int, clock=lambda: next(seconds))
    assert list(passed) == batches
    assert caplog.messages == [
        "16 of 40 images  1 images/s  0:00:45 left",
        "32 of 40 images  1 images/s  0:00:15 left",
    ]


def test_non_main_processes_log_only_what_concerns_them(restored_logging, capsys):
    console.setup_logging()
    console.quiet_secondary_process(3)
    logging.getLogger("mae_jax").info("read 5 images")
    logging.getLogger("mae_jax.run").warning("disk space is low")
    logging.getLogger("mae_jax").warning("an image is corrupt")
    assert capsys.readouterr().err == "process 3: an image is corrupt\n"


def test_tables_print_brackets_as_text(capsys):
    console.print_table("[bold]", ("name", "value"), [("[a]", 1)])
    console.print_summary_table("[title]", {"b": 0.12345})
    out = capsys.readouterr().out
    for text in ("[bold]", "[a]", "[title]", "0.123"):
        assert text in out
