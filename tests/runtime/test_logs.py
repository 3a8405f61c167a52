import json
import logging
import os
import re
import sys
import warnings
from datetime import datetime

import pytest

from herd_node.protocol.auth import Token, render_token
from herd_node.runtime import logs

ours = logging.getLogger("herd.test_logs")
theirs = logging.getLogger("somebody.else")


@pytest.fixture
def start():
    """`logs.setup`, undone after the test."""
    closers: list[logs.Closer] = []

    def setup(*, file=None, level="INFO", console="none") -> logs.Closer:
        closers.append(logs.setup(file=file, level=level, console=console))
        return closers[-1]

    yield setup
    for closer in reversed(closers):
        closer.close()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "herd.jsonl"


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- the file


def test_a_line_says_when_how_bad_who_and_what(start, file):
    start(file=file)
    ours.info("%s joined", "attic", extra={"node_id": "attic", "free_bytes": 7})
    (line,) = lines(file)
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "INFO",
        "logger": "herd.test_logs",
        "message": "attic joined",
        "node_id": "attic",
        "free_bytes": 7,
    }


def test_one_record_is_one_line_of_strict_json_whatever_is_in_it(start, file):
    start(file=file)
    circle: list[object] = []
    circle.append(circle)
    ours.info("a\nb \ud800 模 \0", extra={"nan": float("nan"), "time": "forged", "bytes": b"x"})
    ours.info("odd", extra={"circle": circle})
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines())
    assert first["message"] == "a\nb \ud800 模 \0"
    assert first["time"] != "forged"
    assert second["message"] == "odd"


def test_an_exception_comes_with_its_traceback(start, file):
    start(file=file)
    try:
        raise KeyError("lost")
    except KeyError:
        ours.exception("failed")
    (line,) = lines(file)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("KeyError: 'lost'")


def test_a_join_token_never_gets_into_the_log(start, file, capsys):
    token = render_token(Token("5ca1ab1e", ("http://attic:11435",), bytes(range(32))))
    start(file=file, console="full")
    try:
        raise ValueError(f"bad token {token}")
    except ValueError:
        ours.exception("joining with %s", token, extra={"argv": ["--join", token]})
    for text in (file.read_text(encoding="utf-8"), capsys.readouterr().err):
        assert token not in text
        assert token[10:40] not in text
        assert "herd1_…" in text


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX rights")
def test_the_file_is_its_owners_alone_also_when_it_was_not(start, file):
    before = os.umask(0)
    try:
        start(file=file).close()
        assert file.stat().st_mode & 0o777 == 0o600
        file.chmod(0o644)
        start(file=file)
        assert file.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_each_midnight_begins_a_new_private_file_and_30_are_kept(start, file):
    start(file=file)
    (handler,) = (h for h in logging.getLogger().handlers if isinstance(h, logs._PrivateFile))
    assert (handler.when, handler.backupCount) == ("MIDNIGHT", 30)
    for day in range(1, 32):
        (file.parent / f"herd.jsonl.2020-01-{day:02}").touch()
    ours.info("yesterday")
    handler.rolloverAt = 1_600_000_000  # in September 2020
    ours.info("today")
    assert [line["message"] for line in lines(file)] == ["today"]
    old = sorted(path.name for path in file.parent.iterdir() if path != file)
    assert len(old) == 30
    assert old[0] == "herd.jsonl.2020-01-03"
    if sys.platform != "win32":
        assert file.stat().st_mode & 0o777 == 0o600


def test_a_disk_that_fails_is_mentioned_once_and_never_raises(start, file, capsys):
    start(file=file)
    (handler,) = (h for h in logging.getLogger().handlers if isinstance(h, logs._PrivateFile))

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self): ...

        def close(self): ...

    good, handler.stream = handler.stream, Full()
    ours.info("one")
    ours.info("two")
    handler.stream = good
    ours.info("three")
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert [line["message"] for line in lines(file)] == ["three"]


def test_warnings_of_python_are_logged(start, file):
    start(file=file)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old style", DeprecationWarning, stacklevel=1)
    assert "old style" in lines(file)[0]["message"]


def test_the_level_is_a_threshold_and_talkative_libraries_are_quiet(start, file):
    start(file=file, level="debug")
    ours.debug("seen")
    theirs.debug("seen too")
    talkative = ("httpx", "uvicorn.error", "zeroconf")
    for name in talkative:
        logging.getLogger(name).info("GET /secret")
        logging.getLogger(name).warning("trouble")
    assert [line["message"] for line in lines(file)] == ["seen", "seen too"] + ["trouble"] * len(talkative)


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'loud' is not a log level"):
        logs.setup(file=None, level="loud", console="none")


def test_a_file_that_cannot_be_opened_is_an_error_and_changes_nothing(tmp_path):
    before = [*logging.getLogger().handlers]
    with pytest.raises(OSError):
        logs.setup(file=tmp_path / "nowhere" / "x.jsonl", level="INFO", console="quiet")
    assert logging.getLogger().handlers == before


# --- the console


def test_the_quiet_console_is_a_time_and_a_sentence(start, capsys):
    start(console="quiet", level="debug")
    ours.debug("hidden")
    ours.info("attic joined")
    theirs.warning("hidden")
    theirs.error("shown")
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert re.fullmatch("[0-2][0-9]:[0-5][0-9]:[0-6][0-9]", first[:8])
    assert (first[8:], second[8:]) == (" attic joined", " shown")


def test_the_quiet_console_leaves_the_traceback_to_the_file(start, file, capsys):
    start(console="quiet", file=file)
    ours.error("failed", exc_info=ValueError("x"))
    assert capsys.readouterr().err.count("\n") == 1
    assert "ValueError" in file.read_text()


def test_without_a_file_the_traceback_is_not_lost(start, capsys):
    start(console="quiet")
    ours.error("failed", exc_info=ValueError("x"))
    assert "ValueError: x" in capsys.readouterr().err


def test_the_full_console_says_who(start, capsys):
    start(console="full", level="debug")
    theirs.debug("hello")
    assert capsys.readouterr().err[8:] == " DEBUG   somebody.else: hello\n"


def test_a_message_can_neither_steer_the_terminal_nor_pass_for_two(start, capsys):
    start(console="quiet")
    ours.info("a\x1b[2Jb\r\n12:00:00 all is well\x9b")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("a\\x1b[2Jb\\x0d")
    assert lines[1] == "         12:00:00 all is well\\x9b"


@pytest.mark.skipif(sys.platform == "win32", reason="no colours there")
def test_colour_is_for_trouble_on_a_terminal(start, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    start(console="quiet")
    ours.info("fine")
    ours.warning("hm")
    fine, hm = capsys.readouterr().err.splitlines()
    assert fine[8:] == " fine"
    assert hm[8:] == " \x1b[33mhm\x1b[0m"


# --- beginning and end


def test_a_second_setup_replaces_the_first_and_closing_leaves_no_trace(file, capsys):
    root = logging.getLogger()
    before = ([*root.handlers], root.level, logging.getLogger("httpx").level)
    first = logs.setup(file=file, level="INFO", console="quiet")
    second = logs.setup(file=file, level="INFO", console="quiet")
    ours.info("once")
    assert len(lines(file)) == 1
    assert capsys.readouterr().err.count("once") == 1
    second.close()
    first.close()
    first.close()
    assert ([*root.handlers], root.level, logging.getLogger("httpx").level) == before


def test_what_goes_on_and_on_is_said_once_until_it_was_well_again(caplog):
    logger = logging.getLogger("herd.test_logs.once")
    assert logs.once(logger, "nvml", "no GPU: %s", "driver missing")
    assert not logs.once(logger, "nvml", "no GPU: %s", "driver missing")
    assert logs.once(logger, "heat", "no sensor", level=logging.ERROR)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "no GPU: driver missing"),
        ("ERROR", "no sensor"),
    ]
    assert caplog.records[0].filename == "test_logs.py"
    assert logs.forget(logger, "nvml")
    assert not logs.forget(logger, "nvml")
    assert logs.once(logger, "nvml", "no GPU again")


def test_what_was_said_is_kept_for_a_bounded_number_of_things():
    logger = logging.getLogger("herd.test_logs.many")
    logger.setLevel(logging.CRITICAL)
    for number in range(1200):
        logs.once(logger, f"key {number}", "x")
    assert len(logger.__dict__["_herd_said"]) == 1000
