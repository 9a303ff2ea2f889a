"""Stores of objects: a folder and a bucket behave the same, and a bucket that cannot be used is reported in one line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from csmae.config import ConfigError
from csmae.storage.object_store import ObjectStore, describe_error
from csmae.storage.probe import storage_probe
from tests.conftest import free_port
from tests.support.bucket_server import Server, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running()


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store") if request.param == "folder" else server.url(f"lab/{tmp_path.name}"))


def test_objects_are_written_listed_read_and_removed(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("whole")
    assert store.names("a") == [] and store.get_bytes("a/b") is None
    store.put("a/b", tmp_path / "source")
    store.put_bytes("a/c/d", b"bytes")
    assert store.names("a") == ["b", "c"] and store.get_bytes("a/c/d") == b"bytes"
    assert store.objects().keys() == {"a/b", "a/c/d"}
    store.get("a/b", tmp_path / "new" / "target")
    assert (tmp_path / "new" / "target").read_text() == "whole"
    with pytest.raises(FileNotFoundError):
        store.get("a/missing", tmp_path / "new" / "missing")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["target"]
    store.delete(["a/b", "a/missing"])
    assert store.names("a") == ["c"]
    store.delete_below("a")
    store.delete_below("a")
    assert not store.objects()


def test_a_probe_finds_out_whether_a_node_shares_the_store_and_leaves_nothing(store: ObjectStore) -> None:
    with storage_probe(store) as (probe, driver_error):
        assert driver_error is None and probe.respond("node") is None
        assert probe.can_read("node") and not probe.can_read("another node")
        store.delete([f"{probe.name}/driver"])
        assert probe.respond("node") == f"does not see what the driver writes to {store.url}"
    assert not store.objects()


def test_a_folder_that_cannot_be_written_is_explained_by_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with storage_probe(ObjectStore(str(tmp_path / "file" / "store"))) as (_, driver_error):
        assert driver_error == f"{tmp_path}/file/store cannot be written: Not a directory"
    assert describe_error(OSError("When reading: AWS Error NETWORK_CONNECTION: no\nhost")) == "does not answer"


def test_a_bucket_that_cannot_be_used_is_reported_in_one_line(server: Server) -> None:
    wrong = {
        server.url("absent/x"): "there is no such bucket",
        f"s3://lab/x?endpoint_override=127.0.0.1:{free_port()}&scheme=http": "does not answer",
        "s3://lab/x?endpoint=1": "endpoint",
    }
    for url, text in wrong.items():
        with pytest.raises(ConfigError, match=text) as caught:
            ObjectStore(url).check()
        assert "\n" not in str(caught.value)
