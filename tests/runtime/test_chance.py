import random
import re

from hypothesis import given
from hypothesis import strategies as st

from herd_node.protocol.auth import is_boot
from herd_node.runtime.chance import RisingHex, jitter, new_hex, new_secret


def test_identifiers_are_lower_hex_digits_and_never_the_same():
    drawn = {new_hex(8) for _ in range(100)}
    assert len(drawn) == 100
    assert all(is_boot(text) for text in drawn)
    assert re.fullmatch("[0-9a-f]{24}", new_hex(12))


def test_a_secret_has_32_bytes_and_is_never_the_same():
    assert len(new_secret()) == 32
    assert new_secret() != new_secret()


@given(st.floats(0.001, 1e6), st.floats(0, 1), st.integers())
def test_jitter_stays_within_its_share_and_repeats_from_a_seed(base, share, seed):
    drawn = jitter(base, share, random.Random(seed))
    assert base * (1 - share) <= drawn <= base * (1 + share)
    assert drawn == jitter(base, share, random.Random(seed))


def test_jitter_without_a_seed_differs():
    assert len({jitter(1.0, 0.2) for _ in range(20)}) > 1
    assert jitter(3.0, 0.0) == 3.0


def test_a_source_of_identifiers_gives_each_once() -> None:
    source = RisingHex(lambda: 1_790_000_000.0, at_once=4)
    drawn = [source() for _ in range(10)]
    assert len(set(drawn)) == 10
    assert all(re.fullmatch("[0-9a-f]{24}", one) for one in drawn)


def test_identifiers_rise_with_time() -> None:
    now_wall_s = 1_790_000_000.0
    source = RisingHex(lambda: now_wall_s, at_once=4)
    drawn = []
    for _ in range(12):
        drawn.append(source())
        now_wall_s += 0.25
    assert drawn == sorted(drawn)
    assert len({one[10:] for one in drawn}) == 12
