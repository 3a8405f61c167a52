"""The endpoints that not every backend has, on the fake and on the real server alike."""

from __future__ import annotations

import pytest

from tests.contract.test_contracts import name_of
from tests.fakes import contract_endpoints
from tests.fakes.contract import Check, Target


@pytest.mark.parametrize("check", contract_endpoints.OLLAMA, ids=name_of)
async def test_ollama_keeps_its_contract(ollama: Target, check: Check) -> None:
    await check(ollama)


@pytest.mark.parametrize("check", contract_endpoints.LLAMA, ids=name_of)
async def test_llama_server_keeps_its_contract(llama: Target, check: Check) -> None:
    await check(llama)
