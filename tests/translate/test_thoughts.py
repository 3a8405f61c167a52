"""<think> in a plain text: any split of it gives the same two texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_node.translate.thoughts import Thoughts


def split(prompt: str, pieces: list[str]) -> tuple[str, str]:
    thoughts, texts, thinking = Thoughts(prompt), "", ""
    for said in (*map(thoughts.feed, pieces), thoughts.rest()):
        texts, thinking = texts + said.text, thinking + said.thought
    return texts, thinking


@pytest.mark.parametrize(
    ("prompt", "text", "answer", "thinking"),
    [
        ("", "plain", "plain", ""),
        ("", "", "", ""),
        ("", "  spaced ", "  spaced ", ""),
        ("", "<think>\nhm\n</think>\n\nyes", "yes", "hm"),
        ("", " \n<think>a b</think>c", "c", "a b"),
        ("", "<think></think>c", "c", ""),
        ("", "<think>never closed ", "", "never closed"),
        ("", "<think>a</thinking>b</think>c", "c", "a</thinking>b"),
        ("", "<thin air", "<thin air", ""),
        ("", "<thi", "<thi", ""),
        ("", "x <think>no</think>", "x <think>no</think>", ""),
        ("", "<think>a</think>b</think>c", "b</think>c", "a"),
        ("… <think>\n", "hm</think>yes", "yes", "hm"),
        ("… <think> …", "hm</think>yes", "hm</think>yes", ""),
    ],
)
def test_thoughts_and_answer_are_told_apart_byte_by_byte(
    prompt: str, text: str, answer: str, thinking: str
) -> None:
    assert split(prompt, [text]) == (answer, thinking)
    assert split(prompt, list(text)) == (answer, thinking)


@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<", "/th", "a", " ", "\n", "é"]), max_size=12).map(
        "".join
    ),
    data=st.data(),
)
def test_any_split_gives_the_same(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split("", pieces) == split("", [text])
