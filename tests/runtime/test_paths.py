import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from herd_node.runtime.paths import (
    DataDir,
    FileLock,
    LockHeld,
    create_private,
    default_root,
    read_private,
    write_private,
)

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX rights")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def data(tmp_path) -> DataDir:
    return DataDir(tmp_path / "herd")


# --- the folder


def test_everything_has_its_place(data):
    root = data.root
    assert (data.config_file, data.lock_file) == (root / "herd.toml", root / "herd.lock")
    assert (data.router_file, data.join_file) == (root / "router.json", root / "join")
    assert (data.database_file, data.logs, data.models) == (
        root / "latency.db",
        root / "logs",
        root / "models",
    )
    node = data.node("attic")
    assert (node.root, node.agent_file) == (root / "nodes" / "attic", root / "nodes" / "attic" / "agent.json")
    assert node.lock_file.parent == node.warm_file.parent == node.root
    assert default_root() == Path.home() / ".fleet-manager"


@pytest.mark.parametrize("node_id", ["..", ".", "", "a/b", "../../etc", "a\\b"])
def test_no_node_id_leads_out_of_the_folder(data, node_id):
    with pytest.raises(ValueError):
        data.node(node_id)


@posix_only
@pytest.mark.usefixtures("open_umask")
def test_folders_are_private_whatever_the_umask(data):
    data.ensure()
    data.node("attic").ensure()
    for folder in (data.root, data.logs, data.models, data.nodes, data.node("attic").root):
        assert mode(folder) == 0o700


@posix_only
@pytest.mark.usefixtures("open_umask")
def test_what_others_could_read_is_closed_to_them_and_said(data, caplog):
    data.ensure()
    data.node("attic").ensure()
    exposed = [data.join_file, data.logs / "herd.jsonl", data.node("attic").agent_file]
    for path in exposed:
        path.write_bytes(b"secret")
        path.chmod(0o644)
    data.node("attic").root.chmod(0o755)
    data.root.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        data.ensure()
    assert [mode(path) for path in exposed] == [0o600] * 3
    assert mode(data.root) == mode(data.node("attic").root) == 0o700
    assert f"{data.join_file} was open to other users (644)" in caplog.text


@posix_only
def test_a_private_folder_is_left_as_it_is(data, caplog):
    data.ensure()
    data.join_file.write_bytes(b"x")
    data.join_file.chmod(0o600)
    data.ensure()
    assert caplog.records == []


@posix_only
def test_rights_of_what_a_link_points_to_are_not_touched(data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"x")
    elsewhere.chmod(0o644)
    data.ensure()
    data.config_file.symlink_to(elsewhere)
    data.ensure()
    assert mode(elsewhere) == 0o644


# --- files


@pytest.mark.usefixtures("open_umask")
def test_a_private_file_reads_as_it_was_written_and_is_its_owners_alone(tmp_path):
    path = tmp_path / "join"
    assert read_private(path) is None
    write_private(path, b"one")
    write_private(path, b"two")
    assert read_private(path) == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["join"]
    if sys.platform != "win32":
        assert mode(path) == 0o600


@posix_only
def test_reading_a_secret_that_others_could_read_closes_it(tmp_path, caplog):
    path = tmp_path / "join"
    path.write_bytes(b"hush")
    path.chmod(0o640)
    assert read_private(path) == b"hush"
    assert mode(path) == 0o600
    assert "open to other users (640)" in caplog.text
    assert "hush" not in caplog.text


def test_a_write_that_cannot_be_finished_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "agent.json"
    path.mkdir()
    (path / "in the way").touch()
    with pytest.raises(OSError):
        write_private(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["agent.json"]


def test_of_two_that_make_a_file_the_first_wins_and_both_get_what_it_holds(tmp_path):
    path = tmp_path / "join"
    assert create_private(path, b"first") == b"first"
    assert create_private(path, b"second") == b"first"
    assert read_private(path) == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["join"]
    if sys.platform != "win32":
        assert mode(path) == 0o600


# --- locks


def test_a_lock_has_one_holder(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire()
    assert (first.held, second.acquire(), first.acquire()) == (True, False, False)
    first.release()
    assert second.acquire()
    second.release()
    second.release()
    assert not second.held


def test_a_lock_as_a_block_says_who_is_in_the_way(tmp_path):
    path = tmp_path / "herd.lock"
    with FileLock(path) as lock:
        assert lock.held
        with pytest.raises(LockHeld, match=r"herd\.lock is locked by another process"), FileLock(path):
            pass
    with FileLock(path):
        pass
    assert path.exists()


def test_a_lock_in_a_folder_that_does_not_exist_is_an_error_and_not_a_held_lock(tmp_path):
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "nowhere" / "lock").acquire()


HOLDS_AND_HAS_A_CHILD = """
import subprocess, sys
from pathlib import Path
from herd_node.runtime.paths import FileLock
lock = FileLock(Path(sys.argv[1]))
assert lock.acquire()
says_and_waits = "print('child', flush=True); input()"
subprocess.Popen([sys.executable, "-c", says_and_waits], close_fds=False)
input()
"""


@posix_only
@pytest.mark.slow
def test_a_killed_holder_leaves_no_lock_behind_even_with_a_child_alive(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_AND_HAS_A_CHILD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder.stdin, holder.stdout:
        assert holder.stdout.readline() == b"child\n"
        lock = FileLock(path)
        assert not lock.acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        assert lock.acquire()
        lock.release()
        holder.stdin.close()  # ends the child, which shares the pipe
        assert holder.stdout.read() == b""
