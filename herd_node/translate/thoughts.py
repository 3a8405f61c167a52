"""`<think>…</think>` at the start of a raw text, told apart from the answer as it streams. Pure.

A chat completion needs none of this, llama-server does it there. What is generated from a prompt of the
caller's own (`raw`, `template`, `context`) comes as plain text, and Ollama splits that, too.
"""

from __future__ import annotations

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Said(NamedTuple):
    text: str
    thought: str


class Thoughts:
    """Any split of the same text gives the same thoughts and the same answer.

    start   white space, or the beginning of <think>: held back
    inside  thoughts, until </think>; what may be its beginning is held back, white space before it is dropped
    after   white space behind </think> is dropped
    text    the answer
    """

    def __init__(self, prompt: str) -> None:
        """A prompt may end with the opening mark: then the model begins inside."""
        self._state = "inside" if prompt.rstrip().endswith(OPEN) else "start"
        self._held = ""
        self._thinking_began = False

    def feed(self, text: str) -> Said:
        thought = ""
        self._held += text
        if self._state == "start":
            self._start()
        if self._state == "inside":
            thought = self._inside()
        if self._state == "after":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "text"
        if self._state != "text":
            return Said("", thought)
        held, self._held = self._held, ""
        return Said(held, thought)

    def rest(self) -> Said:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return Said("", held.rstrip()) if self._state == "inside" else Said(held, "")

    def _start(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._state, self._held = "inside", begun[len(OPEN) :]
        elif not OPEN.startswith(begun):
            self._state = "text"

    def _inside(self) -> str:
        if not self._thinking_began:
            self._held = self._held.lstrip()
            self._thinking_began = bool(self._held)
        thought, mark, rest = self._held.partition(CLOSE)
        if mark:
            self._state, self._held = "after", rest
            return thought.rstrip()
        keep = _beginning_of_close(thought)
        sure = thought[: len(thought) - keep].rstrip()
        self._held = thought[len(sure) :]
        return sure


def _beginning_of_close(text: str) -> int:
    """How many characters at the end may be the beginning of </think>."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if text.endswith(CLOSE[:size]):
            return size
    return 0
