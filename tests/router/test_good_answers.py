"""What a caller gets when nothing goes wrong, in both dialects from both kinds of backend."""

from __future__ import annotations

import pytest

from tests.router.kit import QUESTIONS, TEXT, Fleet, Question


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
async def test_a_chat_is_answered_whole(fleet: Fleet, question: Question):
    answer = await fleet.ask(question)
    assert (answer.status, answer.text, answer.whole, answer.errors) == (200, TEXT, True, [])
    assert answer.ends == (1 if question.stream or question.dialect == "ollama" else 0)
    assert answer.headers["x-fleet-attempts"] == "1"
    assert answer.headers["x-fleet-model"] == question.model
    assert answer.headers["x-fleet-node"] in ("a", "b")
    assert float(answer.headers["x-fleet-score"]) > 0
    assert not [name for name in answer.headers if name.startswith("x-herd")]
    [row] = await fleet.check(answer)
    assert (row["status"], row["node_id"], row["request_id"]) == (
        "completed",
        answer.headers["x-fleet-node"],
        answer.headers["x-request-id"],
    )
    assert fleet.requests(question) == 1
