"""Output is whole or absent."""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import NoReturn

import pytest

from mvcodec.files import atomic


def test_a_file_appears_whole_in_a_new_folder(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.bin"
    with atomic(target) as file:
        file.write(b"half")
        assert not target.exists()
        file.write(b" and half")
    assert target.read_bytes() == b"half and half"
    assert [p.name for p in target.parent.iterdir()] == ["a.bin"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with atomic(tmp_path / "atomic") as file:
        file.write(b"")
    plain, made = ((tmp_path / name).stat().st_mode for name in ("plain", "atomic"))
    assert stat.S_IMODE(plain) == stat.S_IMODE(made)


def test_a_link_stays_and_what_it_leads_to_is_new(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere" / "a.bin"
    kept.parent.mkdir()
    kept.write_bytes(b"old")
    link = tmp_path / "link.bin"
    link.symlink_to(Path("elsewhere", "a.bin"))
    with atomic(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert kept.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "link.bin"]


def test_what_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()

    def write() -> None:
        with atomic(tmp_path / "a.png" / "b.phv"):
            pass

    with pytest.raises(NotADirectoryError, match="Not a directory") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "a.png")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_is_left_when_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def write_half() -> None:
        with atomic(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_the_file_that_did_not_fit(tmp_path: Path) -> None:
    def write() -> None:
        with atomic(tmp_path / "a.bin"):
            raise OSError(errno.ENOSPC, "No space left on device")  # as `write` does: without a name

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "a.bin")


def test_a_folder_that_takes_no_files_is_told_of_the_file_that_was_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:  # root writes everywhere
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".mvcodec-xyz.part"))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(PermissionError) as caught, atomic(tmp_path / "a.bin"):
        pass
    assert caught.value.filename == str(tmp_path / "a.bin")
