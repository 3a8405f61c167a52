"""`backends` and `translate` may not import each other; their two words for the same thing must agree."""

from __future__ import annotations

import dataclasses

from herd_node.backends.base import Facts
from herd_node.backends.polled import made_up_digest
from herd_node.translate import ModelFacts, model_digest


def test_facts_and_model_facts_have_the_same_fields() -> None:
    of_the_gateway = ("flavour", "unloads")
    fields = [field.name for field in dataclasses.fields(ModelFacts) if field.name not in of_the_gateway]
    assert fields == list(Facts._fields)
    facts = Facts(name="a", upstream_id="b", capabilities=frozenset({"embedding"}), digest="d")
    assert ModelFacts(**facts._asdict()).capabilities == {"embedding"}


def test_made_up_digests_agree() -> None:
    assert made_up_digest("a", 5) == model_digest("a", 5)
