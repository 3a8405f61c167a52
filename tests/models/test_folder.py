"""The agent's folder of GGUF files: what is seen in it, how it is found, what may be removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd_node.models.folder import ModelsFolder, note_file


@pytest.fixture
def folder(tmp_path: Path) -> ModelsFolder:
    folder = ModelsFolder(tmp_path / "models")
    folder.ensure()
    return folder


def put(folder: ModelsFolder, name: str, note: object = None) -> Path:
    path = folder.root / name
    path.write_bytes(b"GGUF " + name.encode())
    if note is not None:
        note_file(path).write_text(note if isinstance(note, str) else json.dumps(note))
    return path


def test_only_whole_models_that_stand_for_themselves_are_seen(folder: ModelsFolder) -> None:
    for name in (
        "b.gguf", "A.GGUF", "x.gguf.part", "x.gguf.part.json", "mmproj-a.gguf", "notes.txt", "bad name.gguf",
        "big-00001-of-00003.gguf", "big-00002-of-00003.gguf", "big-00003-of-00003.gguf", "<evil>.gguf",
    ):  # fmt: skip
        put(folder, name)
    (folder.root / "lost.gguf").symlink_to(folder.root / "nowhere")
    (folder.root / "sub.gguf.d").mkdir()
    assert [file.name for file in folder.files()] == ["A", "b", "big-00001-of-00003"]
    assert ModelsFolder(folder.root / "not there").files() == ()


def test_a_model_answers_to_its_file_and_to_the_name_it_was_pulled_by(folder: ModelsFolder) -> None:
    note = {"asked_as": "hf.co/Org/Tiny:Q4_K_M", "sha256": "a" * 64}
    path = put(folder, "tiny-Q4_K_M.gguf", note)
    for name in ("tiny-Q4_K_M", "TINY-q4_k_m", "hf.co/org/tiny:q4_k_m", "tiny-Q4_K_M:latest"):
        found = folder.find(name)
        assert found is not None
        assert (found.path, found.sha256, found.aliases) == (path, "a" * 64, ("hf.co/Org/Tiny:Q4_K_M",))
    assert folder.find("tiny") is None
    assert folder.at("TINY-Q4_K_M.gguf") == folder.find("tiny-Q4_K_M")


@pytest.mark.parametrize("note", ["", "[]", "{", '{"asked_as": 7, "sha256": []}', '{"asked_as": "<b>"}'])
def test_a_note_that_says_nothing_sensible_is_as_none(folder: ModelsFolder, note: str) -> None:
    put(folder, "tiny.gguf", note)
    (file,) = folder.files()
    assert (file.asked_as, file.sha256) == ("", None)


def test_a_note_is_read_again_when_it_changed(folder: ModelsFolder) -> None:
    path = put(folder, "tiny.gguf", {"asked_as": "one"})
    assert folder.files()[0].asked_as == "one"
    note_file(path).unlink()
    assert folder.files()[0].asked_as == ""


def test_a_removed_model_leaves_nothing_behind(folder: ModelsFolder) -> None:
    put(folder, "other.gguf")
    put(folder, "tiny.gguf", {"asked_as": "one"})
    file = folder.find("tiny")
    assert file is not None
    folder.remove(file)
    assert {path.name for path in folder.root.iterdir()} == {"other.gguf"}


def test_only_the_link_to_a_file_elsewhere_is_removed_and_nothing_outside(
    folder: ModelsFolder, tmp_path: Path
) -> None:
    outside = tmp_path / "mine.gguf"
    outside.write_bytes(b"GGUF mine")
    (folder.root / "link.gguf").symlink_to(outside)
    file = folder.find("link")
    assert file is not None
    with pytest.raises(PermissionError):
        folder.remove(file._replace(path=outside))
    folder.remove(file)
    assert outside.exists()
    assert folder.files() == ()


def test_a_finished_download_takes_its_place_and_never_anothers(folder: ModelsFolder) -> None:
    part = folder.root / "tiny.gguf.part"
    part.write_bytes(b"GGUF new")
    folder.place(part, "tiny.gguf", {"asked_as": "one"})
    assert (folder.root / "tiny.gguf").read_bytes() == b"GGUF new"
    assert not part.exists()
    part.write_bytes(b"GGUF other")
    with pytest.raises(FileExistsError):
        folder.place(part, "tiny.gguf", {})
    assert (folder.root / "tiny.gguf").read_bytes() == b"GGUF new"
    assert folder.files()[0].asked_as == "one"


def test_it_knows_what_lies_in_it_and_how_much_room_is_left(folder: ModelsFolder, tmp_path: Path) -> None:
    assert folder.holds(str(folder.root / "a.gguf"))
    assert folder.holds(str(folder.root / "sub" / "a.gguf"))
    for path in (tmp_path / "a.gguf", folder.root / ".." / "a.gguf", Path("a.gguf")):
        assert not folder.holds(str(path))
    assert (folder.free_bytes() or 0) > 0
    assert (ModelsFolder(folder.root / "not" / "yet").free_bytes() or 0) > 0
