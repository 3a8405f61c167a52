"""One router without nodes for a module."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from herd.app import Router
from tests.router.kit import running, settings
from tests.web.kit import Lonely


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lonely(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lonely]:
    folder = tmp_path_factory.mktemp("router")
    async with running(Router(settings(folder))) as router:
        yield Lonely(router, folder)
