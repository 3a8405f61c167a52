"""docs/compatibility.md speaks of everything that the translator knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from herd_node.translate import options, requests

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        *options.FLOAT_DEFAULTS,
        *options.INTEGER_DEFAULTS,
        *options.FIXED_INTEGERS,
        *options.FIXED_BOOLEANS,
        *requests.TEXT_FIELDS,
        *requests.REFUSED_FIELDS,
        "num_ctx",
        "num_predict",
        "num_keep",
        "stop",
    ],
)
def test_the_page_names_every_field(name: str) -> None:
    assert f"`{name}`" in PAGE
