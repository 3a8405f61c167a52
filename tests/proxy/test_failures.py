"""What a failed attempt means: docs/behaviour.md's retry table, row by row."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from herd.proxy import failures
from herd.proxy.failures import Effect, Failure


class Row(NamedTuple):
    what: Failure
    elsewhere: bool
    effect: Effect
    status: int
    counts: bool = True
    backoff: bool = True
    retry_after_s: int | None = None
    says: str = ""


def by_status(status: int, text: str = "the cause", retry_after_s: int | None = None) -> Failure:
    return failures.by_status(status, "attic", "Llama3", text, retry_after_s)


def by_agent(word: str, retry_after_s: int | None = None) -> Failure:
    found = failures.by_agent(word, "attic", "Llama3", "the cause", retry_after_s)
    assert found is not None
    return found


NONE, BUSY, DELIST, STALE = Effect.NONE, Effect.BUSY, Effect.DELIST, Effect.STALE
ROWS: dict[str, Row] = {
    "connect": Row(
        failures.unreachable("attic", "the connection was refused"),
        True,
        Effect.UNREACHABLE,
        503,
        backoff=False,
        says="'attic' cannot be reached (the connection was refused)",
    ),
    "reset before head": Row(failures.broken("attic", "it broke off"), True, NONE, 502, says="broke off"),
    "first record too late": Row(failures.too_late("attic", 120), True, NONE, 504, says="120 s"),
    "error first": Row(failures.in_band("attic", "oh no"), True, NONE, 502, says="node 'attic': oh no"),
    "cannot load": Row(failures.in_band("attic", "unable to load model"), True, Effect.BAD_MODEL, 502),
    "500": Row(by_status(500), True, NONE, 502, says="node 'attic': the cause"),
    "500 oom": Row(by_status(500, "cudaMalloc failed: out of memory"), True, Effect.BAD_MODEL, 502),
    "500 llama gone": Row(
        by_status(500, "llama-server process has terminated: signal: killed"), True, Effect.BAD_MODEL, 502
    ),
    "502": Row(by_status(502), True, NONE, 502),
    "504": Row(by_status(504), True, NONE, 504),
    "503": Row(by_status(503), True, BUSY, 503, counts=False),
    "503 with time": Row(by_status(503, retry_after_s=7), True, BUSY, 503, counts=False, retry_after_s=7),
    "429": Row(by_status(429), True, BUSY, 429, counts=False, retry_after_s=2),
    "429 with time": Row(by_status(429, retry_after_s=9), True, BUSY, 429, counts=False, retry_after_s=9),
    "404": Row(by_status(404), True, DELIST, 404, says="model 'Llama3' not found"),
    "401": Row(by_status(401), True, Effect.BAD_MODEL, 502, says="(401)"),
    "403": Row(by_status(403), True, Effect.BAD_MODEL, 502, says="(403)"),
    "400": Row(by_status(400), False, NONE, 400, says="the cause"),
    "405": Row(by_status(405), False, NONE, 405),
    "413": Row(by_status(413), False, NONE, 413),
    "422": Row(by_status(422), False, NONE, 422),
    "499": Row(by_status(499), False, NONE, 499),
    "302": Row(by_status(302), False, NONE, 502, says="redirect"),
    "307": Row(by_status(307), False, NONE, 502),
    "204": Row(by_status(204), True, NONE, 502),
    "501": Row(by_status(501), True, NONE, 501, says="the cause"),
    "599": Row(by_status(599), True, NONE, 502),
    "busy": Row(by_agent("busy"), True, BUSY, 503, counts=False),
    "busy with time": Row(by_agent("busy", 3), True, BUSY, 503, counts=False, retry_after_s=3),
    "refused": Row(by_agent("refused"), True, BUSY, 503, counts=False, says="is down"),
    "not-ready": Row(by_agent("not-ready"), True, BUSY, 503, counts=False),
    "no-model": Row(by_agent("no-model"), True, DELIST, 404),
    "auth": Row(by_agent("auth"), True, STALE, 503, counts=False, backoff=False),
    "boot": Row(by_agent("boot"), True, STALE, 503, counts=False, backoff=False),
    "stale": Row(by_agent("stale"), True, STALE, 503, counts=False, backoff=False),
    "reset": Row(by_agent("reset"), True, NONE, 502),
    "framing": Row(by_agent("framing"), True, NONE, 502),
    "timeout": Row(by_agent("timeout"), True, NONE, 504),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_failure_means_what_the_table_says(name: str):
    row = ROWS[name]
    found = row.what
    seen = Row(
        found,
        found.elsewhere,
        found.effect,
        found.error.status,
        found.counts,
        found.backoff,
        found.error.retry_after_s,
        row.says,
    )
    assert seen == row
    assert row.says in found.error.message


@pytest.mark.parametrize("name", ROWS)
def test_no_sentence_names_an_address(name: str):
    message = ROWS[name].what.error.message
    assert "://" not in message
    assert "127.0.0.1" not in message


def test_only_what_we_end_ourselves_leaves_a_backend_at_work():
    assert [name for name, row in ROWS.items() if row.what.cancelled] == ["first record too late"]


def test_an_unknown_word_says_nothing():
    assert failures.by_agent("sulking", "attic", "m", "x", None) is None
