"""Every request of the corpus, sent to a backend directly and through router and agent: the same answer.

Status, content type and body are compared, of streams too: all their bytes in order. At the fake Ollama the
bytes of the request are compared as well, as they arrive. What may differ stands in `allowed.toml`, with a
reason each. Failures of nodes (a queue that is full, a runner that dies) are `tests/router`'s.
"""

from __future__ import annotations

import pytest

from herd_node.protocol.routes import FORWARDED
from tests.differential import corpus
from tests.differential.corpus import Case
from tests.differential.differences import ANSWERS, Tally, judge
from tests.differential.sides import Sides

CASES = corpus.read()
SERVED = frozenset(route.path for route in FORWARDED)

#: Differences that are bugs, by the request as it is sent: what is wrong. Each goes from here with its bug.
KNOWN_BUGS: dict[str, str] = {}


def _parameter(case: Case) -> object:
    marks = []
    if case.id in KNOWN_BUGS:
        marks.append(pytest.mark.xfail(strict=True, reason=KNOWN_BUGS[case.id], raises=AssertionError))
    if case.path not in SERVED:
        marks.append(pytest.mark.skip(reason=f"{case.path} is not served yet"))
    return pytest.param(case, marks=marks, id=case.id)


def test_every_request_of_the_corpus_has_a_name_and_bytes_of_its_own() -> None:
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)
    answers: dict[tuple[str, bytes], object] = {}
    for case in CASES:
        if case.answer is not None:
            assert answers.setdefault((case.path, case.body), case.answer) == case.answer, case.id
    assert len({case.row for case in CASES}) >= 150


def test_what_is_named_as_a_bug_or_as_different_is_in_the_corpus() -> None:
    assert KNOWN_BUGS.keys() <= {case.id for case in CASES}
    rows = {case.row for case in CASES}
    for row in ANSWERS:
        assert row.rows <= rows, row.rows - rows


def _at(backend: str) -> list[object]:
    return [_parameter(case) for case in CASES if case.backend == backend]


@pytest.mark.parametrize("case", _at("ollama"))
async def test_through_the_router_ollama_answers_the_same(case: Case, ollama: Sides, tally: Tally) -> None:
    judge(case, await ollama.ask(case), tally)


@pytest.mark.llama
@pytest.mark.parametrize("case", _at("llama"))
async def test_through_the_router_llama_cpp_answers_the_same(case: Case, llama: Sides, tally: Tally) -> None:
    judge(case, await llama.ask(case), tally)


def test_no_row_of_allowed_differences_names_a_request_in_vain(
    request: pytest.FixtureRequest, tally: Tally
) -> None:
    """Runs last. A request that is the same by now must not stay in the list."""
    if sum(tally.compared.values()) < len(CASES):
        pytest.skip("only part of the corpus was compared")
    named = {(row.name, name) for row in ANSWERS for name in row.rows}
    assert named <= tally.used, named - tally.used
