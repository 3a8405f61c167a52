"""The step that a plan answers with, and what it must be told to find it. Values only.

`match` on a `Step` is exhaustive: whoever adds one is shown by mypy where it must be carried out.
"""

from __future__ import annotations

from typing import NamedTuple

from herd.request import InferenceRequest
from herd.scheduling.context import AS_ASKED, ContextUse
from herd.scheduling.eligibility import Prompts
from herd.scheduling.standing import Cost
from herd.trace import Card, Exclusion, ScoreCard


class History(NamedTuple):
    """What happened to the request so far, as the shell counts it."""

    tried: frozenset[str] = frozenset()
    """Nodes that failed for this request, whatever the model. One that only said busy is not among them."""
    attempts: int = 0
    model_index: int = 0
    """First model of the chain that is still allowed."""
    waited_s: float = 0.0
    held_s: float = 0.0
    prompts: Prompts | None = None
    """What the first server makes of the prompt of a text completion; the later ones must do the same."""


NEW = History()


class Attempt(NamedTuple):
    """Send it there now: the node is the best one and has a free slot."""

    node_id: str
    instance_key: str
    model: str
    model_index: int
    card: ScoreCard
    candidates: tuple[Card, ...]
    """The eight best, the chosen one first."""
    excluded: tuple[Exclusion, ...]
    cost: Cost
    est_tokens: float
    """Prompt tokens after the model's correction."""
    prefill_s: float
    out_tokens: float
    evicts: tuple[str, ...] = ()
    """Idle instances of the node that the load will push out: not hot any more from now on."""
    context: ContextUse = AS_ASKED
    """What becomes of options that decide how the model is loaded."""
    stand_in: str | None = None
    """A loaded model that the caller did not name, as its node spells it, in place of that of the chain."""


class Wait(NamedTuple):
    """The best node is busy; the request claims it and is planned again on the next event."""

    model: str
    model_index: int
    node_id: str
    instance_key: str
    excluded: tuple[Exclusion, ...]
    budget_s: float
    """How much longer it may wait."""
    blocked: str
    """Why it is not sent: a word of `Blocked`."""


class Hold(NamedTuple):
    """Nobody can take it now, but somebody may soon."""

    reason: str
    message: str
    budget_s: float
    excluded: tuple[Exclusion, ...]


class Pull(NamedTuple):
    """Have a node fetch the model. A seam: not returned by this version."""

    model: str
    node_id: str


class Reject(NamedTuple):
    """It ends here. `status` None: attempts are used up, answer with the last failure."""

    status: int | None
    message: str
    retry_after_s: int | None
    excluded: tuple[Exclusion, ...]


Step = Attempt | Wait | Hold | Pull | Reject


class Waiting(NamedTuple):
    """One request in the router's queue."""

    request: InferenceRequest
    history: History
    arrival_s: float
    deadline_s: float
    """`virtual_deadline` when it first waited; never changed afterwards."""
    held: bool = False
    claim: tuple[str, str] | None = None
    """(node id, instance key) of its last Wait; None when held or never planned."""
