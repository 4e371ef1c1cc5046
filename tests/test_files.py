"""Folders that are whole under their names, on the disk before they have them."""

import os
from pathlib import Path

import pytest

from scaleclip.files import publish_folder, restore_folder


def folder(path: Path, content: str) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(content)
    return path


def test_every_file_and_folder_is_on_the_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def flushed(file: int) -> None:
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), tmp_path))
        fsync(file)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"{source.name} -> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    folder(tmp_path / "out", "old")
    publish_folder(folder(tmp_path / "new", "new"), tmp_path / "out")
    assert sorted(events[:3]) == ["new", "new/inner", "new/inner/file"]
    assert events[3:] == ["out -> .partial-replaced-out", "new -> out", "."]
    assert (tmp_path / "out" / "inner" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_there_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if source.name == "new":
            raise KeyboardInterrupt
        rename(source, target)

    folder(tmp_path / "out", "old")
    new = folder(tmp_path / "new", "new")
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(new, tmp_path / "out")
    assert (tmp_path / "out" / "inner" / "file").read_text() == "old"
    restore_folder(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]
