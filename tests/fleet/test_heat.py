"""What heat does to a node."""

import pytest

from herd.fleet.thermal import effect


@pytest.mark.parametrize(
    ("heat", "takes_work", "share"),
    [
        (None, True, 1.0),
        ("nominal", True, 1.0),
        ("fair", True, 1.0),
        ("serious", True, 0.5),
        ("critical", False, 0.5),
    ],
)
def test_serious_heat_halves_the_free_share_and_critical_heat_excludes(heat, takes_work, share):
    assert effect(heat) == (takes_work, share)
