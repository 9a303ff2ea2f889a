"""Storage in a bucket: objects that killed writers left are removed, and nothing else."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csmae.storage import study_mirror
from csmae.storage.manifest import RemoteFolder
from csmae.storage.object_store import ObjectStore
from csmae.storage.unreferenced import remove_unreferenced
from tests.support.bucket_server import Server, running

UNNAMED = "checkpoint.pt.18b2f3c4d5e6f708"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running()


def test_objects_that_a_killed_writer_left_are_removed_a_day_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, bucket = server.url("lab/garbage"), ObjectStore(server.url("lab/garbage"))
    left = [
        "driver/studies.db.18b2f3c4d5e6f708",
        "study/trials/3/checkpoint.pt.18b2f3c4d5e6f708",
        ".probe-0123456789abcdef",
    ]
    (tmp_path / "files" / "encoder").mkdir(parents=True)
    (tmp_path / "files" / "encoder" / "weights").write_text("named")
    RemoteFolder(bucket, "study/trials/4").claim().push(tmp_path / "files", {})
    RemoteFolder(bucket, "study/trials/3").claim()
    for key in (*left, "notes.txt"):
        bucket.put_bytes(key, b"a kill came before the manifest")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_mirror, "UPLOAD_INTERVAL_S", 0.05)
    for days in (0, 2):
        server.age("lab", "garbage/", days)
        with study_mirror.driver_storage(url):
            time.sleep(0.5)
        assert [key for key in left if bucket.get_bytes(key)] == (left if days == 0 else [])
    assert bucket.get_bytes("notes.txt") and RemoteFolder(bucket, "study/trials/4").manifest().files
    RemoteFolder(bucket, "study/trials/4").fetch(tmp_path / "again", RemoteFolder(bucket, "study/trials/4").manifest())
    assert (tmp_path / "again" / "encoder" / "weights").read_text() == "named"


def test_other_data_in_the_bucket_stays(server: Server) -> None:
    bucket = ObjectStore(server.url("lab/shared"))
    foreign = {
        "experiments/trials/001/data.0123456789abcdef": b"a checksum",
        "experiments/trials/7/manifest.json": b"{}",
        "experiments/trials/7/data.0123456789abcdef": b"a checksum",
        "experiments/trials/8/manifest.json": b'{"files": {}, "metadata": "of a browser extension"}',
        "experiments/trials/8/data.0123456789abcdef": b"a checksum",
        "driver/linux/net.0123456789abcdef": b"a checksum",
        ".probe-list": b"milk",
    }
    ours = {
        f"study/trials/2/{UNNAMED}": b"a claim without a manifest",
        f"study/trials/3/{UNNAMED}": b"a manifest that arrived after the files were deleted",
        ".probe-0123456789abcdef/driver": b"a check",
    }
    for key, content in {**foreign, **ours}.items():
        bucket.put_bytes(key, content)
    RemoteFolder(bucket, "study/trials/2").claim()
    late = f'{{"files": {{"checkpoint.pt": "{UNNAMED}"}}, "metadata": {{}}}}'.encode()
    bucket.put_bytes("study/trials/3/manifest-00000007-0123abcd.json", late)
    server.age("lab", "shared/", 2)
    bucket.put_bytes("now", b"")
    remove_unreferenced(bucket)
    assert {key for key in foreign if bucket.get_bytes(key) is None} == set()
    assert {key for key in ours if bucket.get_bytes(key)} == set()
    assert bucket.names("study/trials/3") == []


def test_a_driver_renews_its_lease_during_a_cleanup_and_does_not_wait_for_it_at_the_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, key = server.url("lab/many"), "many/study/trials/3/encoder"
    trial, driver = RemoteFolder(ObjectStore(url), "study/trials/3"), RemoteFolder(ObjectStore(url), "driver")
    trial.claim()
    for number in range(200):
        server.put("lab", f"{key}/{number}.18b2f3c4d5e6f708")
    server.age("lab", "many/", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_mirror, "UPLOAD_INTERVAL_S", 0.05)
    with study_mirror.driver_storage(url):
        while server.count("lab", key) == 200:
            time.sleep(0.01)
        renewed = driver.manifest().metadata["time"]
        while driver.manifest().metadata["time"] == renewed:
            time.sleep(0.01)
        assert server.count("lab", key), "the cleanup is still running"
    assert driver.manifest().metadata["open"] is False
    left = server.count("lab", key)
    time.sleep(0.3)
    assert left and server.count("lab", key) in (left, left - 1), "one may have been on its way"
