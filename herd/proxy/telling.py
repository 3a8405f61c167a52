"""What a stream waits for, in words: its place in the queue, a load, a pull (`X-Fleet-Progress`).

For callers who want to know; made a few times a minute at most. It says only what the router itself knows.
"""

from __future__ import annotations

from herd.dialects import Dialect
from herd.proxy.autopull import AutoPull
from herd.proxy.ledger import Books, Ledger
from herd.request import InferenceRequest


class Teller:
    """Of one request."""

    __slots__ = ("_books", "_dialect", "_last", "_ledger", "_pulls", "_request")

    def __init__(
        self, books: Books, pulls: AutoPull, request: InferenceRequest, dialect: Dialect, ledger: Ledger
    ) -> None:
        self._books = books
        self._pulls = pulls
        self._request = request
        self._dialect = dialect
        self._ledger = ledger
        self._last = ""

    def word(self) -> bytes:
        """The next record; what keeps the stream alive where there is nothing new to say."""
        text = self._text()
        if text == self._last or self._dialect.progress is None:
            return self._dialect.ping
        self._last = text
        model, wall_s = self._request.asked[0], self._books.clock.wall_s()
        return self._dialect.progress(self._request.route, model, text + "\n", wall_s)

    def _text(self) -> str:
        sent, now_s = self._ledger.sent, self._books.clock.now_s()
        if sent is not None:
            node, passed_s = sent.step.node_id, now_s - sent.started_s
            if not sent.cold:
                return f"Node {node} is at work on the prompt."
            load_s = sent.step.cost.load
            if passed_s >= load_s:
                return f"Node {node} is loading {sent.shown}; it takes longer than expected."
            percent = int(100 * passed_s / load_s)
            return f"Node {node} is loading {sent.shown}: {percent} %, about {load_s - passed_s:.0f} s left."
        outlook = self._books.room.outlook(self._request.request_id)
        if outlook is not None:
            expected = f", about {outlook.expected_s:.0f} s" if outlook.expected_s is not None else ""
            return f"Waiting for a free slot: number {outlook.place} of {outlook.waiting}{expected}."
        pull = self._pulls.progress((self._request.resolved or self._request.asked)[0])
        if pull is None:
            return "Looking for a node."
        rest_s = pull.rest_s(now_s)
        left = f", about {rest_s:.0f} s left" if rest_s is not None else ""
        return f"Node {pull.node_id} is pulling {pull.model}: {pull.percent} %{left}."
