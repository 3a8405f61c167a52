"""What a newcomer does first: the README's command, and the built wheel away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import psutil
import pytest

from tests.e2e.kit import free_port, until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.llama
def test_the_demo_answers_once_and_leaves_nothing_running(small_model_path: Path, tmp_path: Path) -> None:
    # The model is taken from where it lies; nothing else of the user's folder is touched.
    models = tmp_path / "data" / "models"
    models.mkdir(parents=True)
    for file in small_model_path.parent.glob(f"{small_model_path.name}*"):
        (models / file.name).hardlink_to(file)
    done = subprocess.run(
        [sys.executable, "-m", "herd", "demo", "--once", "--data-dir", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "Served by node demo with smollm2:135m, score " in done.stdout
    assert "tokens/s" in done.stdout
    left = [p for p in psutil.process_iter(["cmdline"]) if _is_of_the_demo(p)]
    assert left == []


def _is_of_the_demo(process: psutil.Process) -> bool:
    """By its temporary folder, or as an orphaned llama.cpp server."""
    words = process.info["cmdline"] or ()
    return any("herd-demo-" in word for word in words) or (
        "herd_node.backends.embedded_server" in words and process.ppid() == 1
    )


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it would be installed: built here, unpacked where no repository is near."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), "."],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        timeout=180,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".pth")]
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_templates_and_migrations_and_no_tests(unpacked_wheel: Path) -> None:
    assert (unpacked_wheel / "herd/web/dashboard_templates/base.html").is_file()
    assert list((unpacked_wheel / "herd/store/migrations").glob("*.sql"))
    assert not (unpacked_wheel / "tests").exists()


def test_the_wheel_serves_its_page_outside_the_repository(unpacked_wheel: Path, tmp_path: Path) -> None:
    port = free_port()
    where = ["--host", "127.0.0.1", "--port", str(port), "--data-dir", str(tmp_path / "d"), "--no-mdns"]
    router = subprocess.Popen(
        [sys.executable, "-m", "herd", *where],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked_wheel)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        page = until(lambda: _page(port), "the page")
        assert b"<title>herd" in page
    finally:
        router.terminate()
        output = router.communicate(timeout=40)[0]
    assert router.returncode == 0, output


def _page(port: int) -> bytes:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/dashboard", timeout=5) as answer:
            body: bytes = answer.read()
            return body
    except OSError:
        return b""


def test_the_import_contracts_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(program)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
