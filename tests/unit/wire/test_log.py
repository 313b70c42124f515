"""
The whole of: what a line of the log is.

Called from: pytest.
"""

import json
import logging
import sys

from pillion.wire import log


def line(message: str, *args: object, **extra: object) -> dict[str, object]:
    record = logging.LogRecord("pillion_sidecar.supervisor.staging", logging.WARNING, __file__, 1, message, args, None)
    record.created, record.msecs = 1_795_000_000.25, 250.0
    record.__dict__.update(extra)
    entry = json.loads(log.JsonFormatter(["step", "path"]).format(record))
    assert isinstance(entry, dict)
    return entry


def test_a_line_is_one_json_object_with_utc_time_level_logger_and_message() -> None:
    """As every collector of logs reads it, down to the millisecond."""
    assert line("step %d is late", 7) == {
        "time": "2026-11-18T11:06:40.250Z",
        "level": "WARNING",
        "logger": "pillion_sidecar.supervisor.staging",
        "message": "step 7 is late",
    }


def test_a_line_has_the_named_fields_and_nothing_else_of_extra() -> None:
    """What is not in the list is never logged by accident."""
    entry = line("late", step=7, token="secret")
    assert entry["step"] == 7
    assert "secret" not in json.dumps(entry)


def test_a_value_that_json_has_no_form_for_is_said_as_text() -> None:
    """A line of the log never fails."""
    assert line("late", path=ValueError("no such path"))["path"] == "no such path"


def test_a_long_message_and_a_long_traceback_are_cut() -> None:
    """An error may contain a megabyte of a server's answer. Of a traceback the end is kept, which names the error."""
    assert len(str(line("x" * 1_000_000)["message"])) == log.TEXT_LIMIT
    try:
        raise ValueError("y" * 1_000_000 + " at the end")
    except ValueError:
        record = logging.LogRecord("pillion", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    traceback = json.loads(log.JsonFormatter([]).format(record))["traceback"]
    assert len(traceback) == log.TEXT_LIMIT
    assert traceback.endswith(" at the end")


def test_the_lines_stay_single() -> None:
    """A message of several lines is still one line of the log."""
    record = logging.LogRecord("pillion", logging.INFO, __file__, 1, "one\ntwo", (), None)
    assert "\n" not in log.JsonFormatter([]).format(record)
