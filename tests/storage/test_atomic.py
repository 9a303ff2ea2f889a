"""Atomic writes: a file has all of its new content or all of its old one, and no draft is left."""

from pathlib import Path

import pytest

from csmae.atomic import atomic_write


@pytest.mark.parametrize("concurrent", [False, True])
def test_an_error_leaves_the_old_content_and_no_draft(tmp_path: Path, concurrent: bool) -> None:
    path = tmp_path / "file"
    with atomic_write(path, concurrent=concurrent) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path, concurrent=concurrent, durable=True) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_next_writer_overwrites_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_bytes(b"half of something longer")
    with atomic_write(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


def test_concurrent_writers_do_not_mix_their_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path, concurrent=True) as first, atomic_write(path, concurrent=True) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_must_not_be_overwritten_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path, overwrite=False, mode=0o600) as file:
        file.write(b"first")
    with pytest.raises(FileExistsError), atomic_write(path, overwrite=False) as file:
        file.write(b"second")
    assert path.read_bytes() == b"first" and path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
