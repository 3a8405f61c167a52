"""Progress of a pull, from the lines as they go by."""

from __future__ import annotations

import pytest

from herd.proxy.pulls import Pull, Pulls
from tests.fakes.recordings import recording


def fed(body: bytes, cut: int = 1) -> Pull:
    pull = Pull("attic", "tiny", 100.0)
    for at in range(0, len(body), cut):
        pull.feed(body[at : at + cut])
    pull.end()
    return pull


@pytest.mark.parametrize("cut", [1, 7, 1000, 10**6])
def test_a_recorded_pull_ends_at_a_hundred_percent_however_it_is_cut(cut: int) -> None:
    pull = fed(recording("ollama/pull").body, cut)
    assert (pull.ok, pull.error, pull.status, pull.percent) == (True, None, "success", 100)
    assert pull.total_bytes == 12582912


def test_an_error_line_is_the_pulls_error() -> None:
    pull = fed(recording("ollama/pull-not-found").body)
    assert (pull.ok, pull.error) == (False, "pull model manifest: file does not exist")


def test_layers_add_up_and_the_rest_is_estimated() -> None:
    pull = Pull("attic", "tiny", 100.0)
    assert pull.rest_s(110.0) is None
    pull.feed(b'{"status":"pulling a","digest":"a","total":100}\n')
    pull.feed(b'{"status":"pulling a","digest":"a","total":100,"completed":50}\n')
    pull.feed(b'{"status":"pulling b","digest":"b","total":300,"completed":50}\n')
    assert (pull.completed_bytes, pull.total_bytes, pull.percent) == (100, 400, 25)
    assert pull.rest_s(110.0) == 30.0
    shown = pull.as_dict(110.0)
    assert (shown["eta_s"], shown["running_s"], shown["node_id"]) == (30.0, 10.0, "attic")


@pytest.mark.parametrize(
    "line",
    [b"x\n", b"[]\n", b'{"status":1,"digest":2,"total":"x"}\n', b'{"total":5}\n', b"\n"],
)
def test_nonsense_does_no_harm(line: bytes) -> None:
    pull = fed(line)
    assert (pull.ok, pull.percent) == (False, 0)


def test_a_last_line_without_its_end_counts() -> None:
    assert fed(b'{"status":"success"}').ok


def test_only_what_runs_is_listed() -> None:
    pulls = Pulls()
    with pulls.one("attic", "tiny", 1.0) as pull:
        assert list(pulls) == [pull]
    assert list(pulls) == []
