"""Folders in a bucket: one writer at a time, and only whole states for every reader."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from csmae.config import ConfigError
from csmae.storage.manifest import Manifest, RemoteFolder, SupersededError, object_names
from csmae.storage.object_store import ObjectStore
from tests.support.bucket_server import Server, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running()


def write_files(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_state_is_downloaded_as_it_was_whatever_is_pushed_meanwhile(server: Server, tmp_path: Path) -> None:
    remote, here = (
        RemoteFolder(ObjectStore(server.url("lab/one")), "trial"),
        write_files(tmp_path / "a", model="1", encoder__x="1"),
    )
    assert remote.manifest() == Manifest()
    claim = remote.claim()
    first = claim.push(here, {"epoch": 1})
    write_files(here, model="22")
    second = claim.push(here, {"epoch": 2})
    assert first.files["encoder/x"] == second.files["encoder/x"] and first.files["model"] != second.files["model"]
    remote.fetch(tmp_path / "b", remote.manifest())
    assert contents(tmp_path / "b") == {"model": "22", "encoder/x": "1"}
    with pytest.raises(FileNotFoundError):
        remote.fetch(tmp_path / "c", first)
    remote.delete()
    assert ObjectStore(server.url("lab/one")).names("trial/encoder") == [] and remote.manifest() == Manifest()


def test_a_manifest_that_names_files_elsewhere_is_rejected(server: Server) -> None:
    remote = RemoteFolder(ObjectStore(server.url("lab/two")), "trial")
    key = f"trial/manifest-{remote.claim().token}.json"
    for name in ("../../escape", "/tmp/escape"):
        remote.store.put_bytes(key, json.dumps({"files": {name: "x.1"}, "metadata": {}}).encode())
        with pytest.raises(ConfigError, match="a file outside its folder"):
            remote.manifest()
    remote.store.put_bytes(key, b"[]")
    with pytest.raises(ConfigError, match="is damaged"):
        remote.manifest()


def test_a_writer_whose_files_were_deleted_cannot_write(server: Server, tmp_path: Path) -> None:
    bucket, here = ObjectStore(server.url("lab/deleted")), tmp_path / "here"
    remote = RemoteFolder(bucket, "study/trials/0")
    here.mkdir()
    (here / "weights").write_text("old")
    old = remote.claim()
    state = old.push(here, {"epoch": 1})
    remote.delete()
    with pytest.raises(SupersededError, match="study/trials/0 was deleted"):
        old.push(here, {"epoch": 2})
    assert remote.manifest() == Manifest() and not bucket.names(remote.key)
    bucket.put_bytes(f"{remote.key}/manifest-{old.token}.json", json.dumps(vars(state)).encode())  # it was on its way
    assert remote.manifest() == Manifest()
    new = remote.claim()
    (here / "weights").write_text("new")
    new.push(here, {"epoch": 3})
    assert remote.manifest().metadata == {"epoch": 3}


def test_files_are_listed_while_a_thread_removes_snapshots_beside_them(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"state")
    stop = threading.Event()

    def make_and_remove() -> None:
        while not stop.is_set():
            inner = tmp_path / ".snapshot-1" / "encoder"
            inner.mkdir(parents=True)
            (inner / "config.json").write_bytes(b"{}")
            shutil.rmtree(tmp_path / ".snapshot-1")

    thread = threading.Thread(target=make_and_remove)
    thread.start()
    try:
        for _ in range(2000):
            assert list(object_names(tmp_path)) == ["checkpoint.pt"]
    finally:
        stop.set()
        thread.join()
