"""Files are whole or absent, and what cannot be written is known beforehand."""

from pathlib import Path

import pytest

from dovetail.text.atomic import check_folder, check_new_file, write_bytes


def test_what_passes_the_check_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    check_new_file(path)
    assert not path.parent.exists()  # a check writes nothing
    write_bytes(path, b"whole")
    check_new_file(path)
    write_bytes(path, b"again")
    assert path.read_bytes() == b"again" and [each.name for each in path.parent.iterdir()] == ["file.txt"]


def test_what_does_not_pass_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "file" / "below", "is a file, not a directory")):
        with pytest.raises(ValueError, match=message):
            check_new_file(path)
        with pytest.raises(OSError):
            write_bytes(path, b"")


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the answer of the system is given here."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be written to; give another place"):
        check_folder(tmp_path / "out")
