"""What is counted and marked of a prompt, whichever way it is read."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.dialects.base import Prompt

#: Short ones of any script, and some around the length of which only both ends are hashed.
TEXTS = st.one_of(
    st.text(max_size=20),
    st.builds(lambda text, size: text + "é" * size, st.text(max_size=5), st.integers(65_520, 65_560)),
)
MESSAGES = st.lists(st.tuples(st.text(max_size=12), TEXTS), max_size=4)


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(images=st.integers(0, 2), messages=MESSAGES, cut=st.booleans())
def test_a_message_of_text_alone_counts_the_same_in_one_step(
    images: int, messages: list[tuple[str, str]], cut: bool
):
    at_once, in_steps = Prompt(cut=cut), Prompt(cut=cut)
    for prompt in (at_once, in_steps):
        for _ in range(images):
            prompt.image("x")
    for role, text in messages:
        at_once.said(role, text)
        in_steps.message(role, text)
        in_steps.mark()
    assert at_once.marks == in_steps.marks
    assert at_once.tokens == in_steps.tokens
    assert len(at_once.marks) == len(messages)
