"""schemathesis, as a program of its own, against a running router: docs/openapi.yaml says what happens.

It makes requests of the page's schemas, good and bad, and looks at each answer: its status is on the page,
and so are its media type, headers and body; what breaks the schema is refused; nothing is a 500. What is
looked for, and the seed, stand in schemathesis.toml.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests import api_page
from tests.router.kit import QUESTIONS, TEXT, Fleet, until

CONFIG = Path(__file__).with_name("schemathesis.toml")
PATIENCE_S = 120


@pytest_asyncio.fixture(loop_scope="session")
async def managed(fleet: Fleet) -> AsyncIterator[Fleet]:
    """A fleet whose models are as before once the test has ended (some calls copy, pull and delete), and
    which works then."""
    before = {node_id: list(fake.dialect.models) for node_id, fake in fleet.ollama.items()}
    yield fleet
    for node_id, fake in fleet.ollama.items():
        fake.dialect.models[:] = before[node_id]
    await fleet.reset()
    assert (await fleet.ask(QUESTIONS[0])).text == TEXT


@pytest.mark.slow
async def test_no_request_made_of_the_page_is_answered_as_the_page_does_not_say(
    managed: Fleet, tmp_path: Path
):
    url = f"http://127.0.0.1:{managed.router.port}"
    command = [
        "-c",
        "from schemathesis.cli import schemathesis; schemathesis()",
        "--config-file",
        str(CONFIG),
    ]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *command, "run", str(api_page.FILE), "--url", url),
        cwd=tmp_path,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            said = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said[-20_000:]
    assert f"Tested: {len(api_page.operations())}" in said
    generated = re.search(r"(\d+) generated, \1 passed", said)
    assert generated is not None, said[-5000:]
    assert int(generated[1]) > 2000
    await until(lambda: managed.live() == 0 and not managed.router.dispatcher.live, "the fleet to be idle")
