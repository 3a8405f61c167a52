"""The judge itself: what it overlooks, and that nothing else is overlooked."""

from __future__ import annotations

import pytest

from tests.differential.corpus import Case
from tests.differential.differences import Tally, judge
from tests.differential.sides import Pair
from tests.router.kit import Answer

BODY = b'{"id":"chatcmpl-aB1","created":5,"model":"m","x":1,"content":"a","eval_duration":7}'
CASE = Case("v1-chat-completions/any", "whole", "ollama", "/v1/chat/completions", b"{}", None)


def answer(
    body: bytes = BODY, *, status: int = 200, kind: str = "application/json", whole: bool = True
) -> Answer:
    return Answer(status, {"content-type": kind}, body, whole)


def judged(routed: Answer, direct: Answer | None = None, row: str = CASE.row) -> Tally:
    tally = Tally()
    judge(CASE._replace(row=row), Pair(direct or answer(), routed), tally)
    return tally


def test_the_same_bytes_are_the_same() -> None:
    assert judged(answer()).identical == 1


def test_ids_and_times_may_differ_and_are_counted() -> None:
    other = BODY.replace(b"aB1", b"zzzz").replace(b":5,", b":66,").replace(b":7}", b":8}")
    tally = judged(answer(other))
    assert (tally.identical, tally.but_values) == (0, 1)
    assert tally.allowed == {"id": 1, "created": 1, "durations": 1}


@pytest.mark.parametrize(
    "routed",
    [
        pytest.param(answer(BODY.replace(b'"a"', b'"b"')), id="another word"),
        pytest.param(
            answer(BODY.replace(b'"model":"m","x":1', b'"x":1,"model":"m"')), id="another order of keys"
        ),
        pytest.param(answer(BODY.replace(b'"x":1', b'"x": 1')), id="a space"),
        pytest.param(answer(BODY.replace(b'"x":1', b'"x":1.0')), id="another spelling of a number"),
        pytest.param(answer(BODY.replace(b',"x":1', b"")), id="a field less"),
        pytest.param(answer(BODY.replace(b'"id":"chatcmpl-aB1"', b'"id":null')), id="no id"),
        pytest.param(answer(BODY + b"\n"), id="a newline more"),
        pytest.param(answer(status=201), id="another status"),
        pytest.param(answer(kind="application/json; charset=utf-8"), id="another content type"),
        pytest.param(answer(whole=False), id="cut off"),
    ],
)
def test_whatever_else_differs_is_a_bug(routed: Answer) -> None:
    with pytest.raises(AssertionError):
        judged(routed)


def test_a_refusal_may_have_another_form_but_not_another_sentence_or_status() -> None:
    direct = answer(b'{"error":{"code":400,"message":"no"}}', status=400)
    assert judged(answer(b'{"error":"no"}', status=400), direct).different == 1
    for routed in (answer(b'{"error":"yes"}', status=400), answer(b'{"error":"no"}', status=404)):
        with pytest.raises(AssertionError):
            judged(routed, direct)


def test_a_row_with_names_is_for_these_requests_alone() -> None:
    direct, routed = answer(b'{"error":"one"}', status=400), answer(b'{"error":"other"}', status=400)
    assert judged(routed, direct, "api-chat/err-bad-json").used == {("bad input", "api-chat/err-bad-json")}
    with pytest.raises(AssertionError):
        judged(routed, direct)


def test_a_request_that_arrives_changed_is_a_bug_even_if_the_answer_is_the_same() -> None:
    path = CASE.path
    same = Pair(answer(), answer(), [(path, b'{"a": 1}')], [(path, b'{"a": 1}')])
    judge(CASE, same, Tally())
    with pytest.raises(AssertionError, match="another request"):
        judge(CASE, Pair(answer(), answer(), [(path, b'{"a": 1}')], [(path, b'{"a":1}')]), Tally())
