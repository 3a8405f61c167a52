"""A body of any length: in memory while it is small, then in a file without a name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_node.net.spool import MEMORY_BYTES, Spool


async def spooled(pieces: list[bytes], folder: Path | None = None) -> Spool:
    spool = Spool(folder)
    for piece in pieces:
        await spool.write(piece)
    await spool.end()
    return spool


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
async def test_what_goes_in_comes_out_and_its_hash_is_right(pieces: list[bytes], times: int) -> None:
    pieces = [piece * (1 + times * 9000) for piece in pieces]
    whole = b"".join(pieces)
    with await spooled(pieces) as spool:
        assert (spool.size_bytes, spool.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
        for _ in range(2):
            assert await spool.whole() == whole


async def test_a_large_body_is_no_longer_in_memory_and_its_file_has_no_name(tmp_path: Path) -> None:
    piece = bytes(65536)
    with await spooled([piece] * 64, tmp_path) as spool:
        assert len(spool._memory) == 0
        assert list(tmp_path.iterdir()) == []
        assert max([len(part) async for part in spool.pieces()]) <= MEMORY_BYTES
    with pytest.raises(ValueError, match="has been let go"):
        await spool.whole()


async def test_a_folder_that_takes_nothing_is_an_error_and_not_a_loss(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        await spooled([bytes(2 * MEMORY_BYTES)], tmp_path / "not there")
