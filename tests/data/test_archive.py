"""All archives keep the contract of ``Split``."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from csmae.config import Data, Synthetic
from csmae.data.archive import open_archive
from csmae.data.errors import ArchiveError, DamagedValueError
from csmae.data.formats.lmdb_index import Index
from csmae.data.loader import batches, sequential_rows
from csmae.sensors import CLASSES, S1_BANDS, S2_10M_BANDS, S2_20M_BANDS
from tests.support.archives import (
    FILES,
    SPLITS,
    bands_of,
    labels_of,
    names_of,
    open_folder,
    put,
    splits_of,
    write_pickles,
    write_v2,
)
from tests.support.processes import PythonProcess
from tests.support.v1_pickles import pickled, write_v1

SOURCES: dict[str, Callable[[Path], Path]] = {"v1": write_pickles, "v2": write_v2}


@pytest.fixture(params=list(SOURCES))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return SOURCES[request.param](tmp_path / "archive")


def numbers_of(split: str) -> list[int]:
    return [number for number, name in enumerate(splits_of()) if name == split]


@pytest.mark.parametrize("name", list(SPLITS))
def test_a_split_returns_each_pair_as_it_was_written(folder: Path, name: str) -> None:
    split = open_folder(folder).split(name)
    assert len(split) == SPLITS[name]
    batch = split.read(range(len(split)))
    for row, number in enumerate(numbers_of(name)):
        bands = bands_of(number)
        assert np.array_equal(batch.s1[row].numpy(), np.stack([bands[band] for band in S1_BANDS]))
        assert np.array_equal(batch.s2_10m[row].numpy(), np.stack([bands[band] for band in S2_10M_BANDS]))
        assert np.array_equal(batch.s2_20m[row].numpy(), np.stack([bands[band] for band in S2_20M_BANDS]))
        assert [CLASSES[index] for index in np.flatnonzero(split.labels()[row])] == sorted(labels_of(number))
        assert split.names[row] in names_of(number)


def test_take_returns_pairs_in_the_requested_order(folder: Path) -> None:
    split = open_folder(folder).split("train")
    part = split.take([3, 0, 3])
    assert part.names == [split.names[3], split.names[0], split.names[3]]
    assert np.array_equal(part.labels(), split.labels()[[3, 0, 3]])
    assert torch.equal(part.read([0, 1, 2]).s1, split.read([3, 0, 3]).s1)


def test_the_loader_yields_what_read_returns(folder: Path) -> None:
    split = open_folder(folder).split("train")
    rows = sequential_rows(len(split), 2)
    for row, batch in zip(rows, batches(split, rows), strict=True):
        for loaded, read in zip(batch, split.read(row), strict=True):
            assert torch.equal(loaded, read)


def test_a_single_sensor_can_be_read(folder: Path) -> None:
    archive = open_folder(folder)
    both = archive.split("train").read([0, 1])
    s1, s2 = (archive.split("train", sensors=(sensor,)).read([0, 1]) for sensor in ("s1", "s2"))
    assert torch.equal(s1.s1, both.s1) and len(s1.s2_10m) == len(s1.s2_20m) == 0
    assert torch.equal(s2.s2_20m, both.s2_20m) and len(s2.s1) == 0


def test_an_archive_of_one_sensor_works_for_that_sensor(tmp_path: Path) -> None:
    write_v2(tmp_path / "both")
    with (
        lmdb.open(str(tmp_path / "both/archive.lmdb"), readonly=True) as environment,
        environment.begin() as transaction,
    ):
        only_s2 = {key.decode(): value for key, value in transaction.cursor() if key.startswith(b"S2")}
    put(tmp_path / "s2", only_s2)
    shutil.copy(tmp_path / "both/metadata.parquet", tmp_path / "s2")
    archive = open_folder(tmp_path / "s2")
    assert len(archive.split("train", sensors=("s2",)).read([1]).s2_10m) == 1
    with pytest.raises(ArchiveError, match=r"5 of 5 patches are not in .*: S1A_IW_GRDH"):
        archive.split("train")


def test_pickles_of_one_sensor_work_for_that_sensor(tmp_path: Path) -> None:
    bands = {name: band for name, band in bands_of(0).items() if name[0] == "B"}
    write_v1(tmp_path, {"patch": pickled(bands, labels_of(0))}, {"train.csv": ["patch"]})
    archive = open_folder(tmp_path)
    assert torch.equal(archive.split("train", sensors=("s2",)).read([0]).s2_10m[0, 0], torch.from_numpy(bands["B02"]))
    with pytest.raises(DamagedValueError, match=r"patch: band VH is missing \(found B02"):
        archive.split("train").read([0])


@pytest.mark.parametrize("version", [0, 1])
def test_lists_of_a_v2_archive_may_use_names_of_either_version(tmp_path: Path, version: int) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    for number, file in enumerate(FILES.values()):
        (lists / file).write_text(f"{names_of(number + 4)[version]}\n")
    archive = open_folder(write_v2(tmp_path / "archive"), splits_dir=str(lists))
    assert archive.split("test").names == [names_of(6).v2]


def test_lists_of_a_v1_archive_may_use_v2_names_if_there_is_metadata(tmp_path: Path) -> None:
    write_pickles(tmp_path / "v1")
    shutil.copy(write_v2(tmp_path / "v2") / "metadata.parquet", tmp_path / "v1")
    for file in FILES.values():
        (tmp_path / "v1" / file).write_text(f"{names_of(8).v2}\n")
    assert open_folder(tmp_path / "v1").split("validation").names == [names_of(8).v1]


def test_the_synthetic_archive_keeps_the_contract_and_depends_only_on_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_train": 33, "num_validation": 4, "num_test": 4}
    found = []
    for cache, seed in (("a", 1), ("b", 1), ("c", 2)):
        monkeypatch.setenv("CSMAE_CACHE", str(tmp_path / cache))
        split = open_archive(Data(synthetic=Synthetic(**settings, seed=seed))).split("train")
        found.append((split.read(range(33)), split.labels(), split.names))
    assert len(found[0][2]) == 33 and found[0][1].any(1).all()
    assert found[0][2] == found[1][2] and np.array_equal(found[0][1], found[1][1])
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert not torch.equal(found[0][0].s1, found[2][0].s1)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_processes_that_race_for_the_synthetic_archive_read_the_same_one(tmp_path: Path) -> None:
    code = "from csmae.config import *; from csmae.data.archive import open_archive as o;"
    code += "s = o(Data(synthetic=Synthetic(num_train=8, num_validation=2, num_test=2))).split('train'); print(s.read([0]).s1.sum())"
    racers = [PythonProcess(code, environment={"CSMAE_CACHE": str(tmp_path)}) for _ in range(3)]
    done = [racer.done() for racer in racers]
    results = {racer.stdout for racer in done}
    assert [racer.returncode for racer in done] == [0, 0, 0]
    assert len(results) == 1
    assert len(list(tmp_path.iterdir())) == 1


REAL_DATA = Path(os.environ.get("CSMAE_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))
needs_real_data = pytest.mark.skipif(not REAL_DATA.exists(), reason=f"no real patches in {REAL_DATA} (CSMAE_REAL_DATA)")


@needs_real_data
def test_the_real_archives_of_both_versions_hold_the_same_pixels() -> None:
    v1, v2 = (open_folder(REAL_DATA / f"bigearthnet-v{version}") for version in (1, 2))
    names = v1.split("train").names
    a, b = (archive.select(np.array(names, "S"), "names").read(range(len(names))) for archive in (v1, v2))
    assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))
    assert v2.split("test").labels().sum() > 6


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the number of keys of each look-up in an LMDB."""
    num_keys: list[int] = []
    find = Index.find

    def counted(self: Index, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        num_keys.append(len(keys))
        return find(self, keys)

    monkeypatch.setattr(Index, "find", counted)
    return num_keys


def test_splits_are_cached_for_all_trials_of_a_worker(folder: Path, lookups: list[int]) -> None:
    first = {name: open_folder(folder).split(name) for name in SPLITS}
    assert lookups
    lookups.clear()
    for name, split in first.items():
        again = open_folder(folder).split(name)
        assert again.names == split.names
        assert np.array_equal(again.labels(), split.labels())
    assert lookups == []


def test_a_split_is_read_again_when_its_list_or_options_change(folder: Path, lookups: list[int]) -> None:
    names = open_folder(folder).split("test").names
    (folder / "test.csv").write_text(f"{names[1]}\n")
    assert open_folder(folder).split("test").names == names[1:]
    (folder / "test.csv").write_text(f"{names[0]}\n")
    os.utime(folder / "test.csv", ns=(1, 1))
    assert open_folder(folder).split("test").names == names[:1]
    assert open_folder(folder).split("test", ("s1",)).sensors == ("s1",)
    assert open_folder(folder, on_error="skip").split("test").on_error == "skip"


def test_damage_recorded_by_one_reader_is_not_passed_to_the_next(folder: Path) -> None:
    put(folder, {names_of(2).v2: b"damaged", names_of(2).v1: b"damaged"})
    archive = open_folder(folder, on_error="skip")
    split = archive.split("train")
    split.read(range(len(split)))
    assert len(split.damaged) == 1
    assert archive.split("train").damaged == {}
