"""An archive is named by its content."""

from pathlib import Path

from csmae.config import Data, Synthetic
from csmae.data.archive import data_name, fingerprint
from tests.support.archives import write_pickles, write_v2


def test_copies_of_an_archive_have_the_same_name(tmp_path: Path) -> None:
    names = {data_name(Data(path=str(write_v2(tmp_path / place)))) for place in ("here", "there")}
    assert names == {"BigEarthNet v2, 5 train, 3 validation, 2 test pairs"}


def test_the_name_contains_the_version_and_a_limit_of_training_pairs(tmp_path: Path) -> None:
    path = str(write_pickles(tmp_path / "old"))
    assert data_name(Data(path=path)) == "BigEarthNet v1, 5 train, 3 validation, 2 test pairs"
    assert data_name(Data(path=path, max_train_pairs=4)) == "BigEarthNet v1, 4 train, 3 validation, 2 test pairs"
    assert data_name(Data(path=path, max_train_pairs=9)) == data_name(Data(path=path))


def test_the_name_of_a_synthetic_archive_begins_with_synthetic() -> None:
    sizes = Synthetic(num_train=4, num_validation=3, num_test=2, seed=7)
    assert data_name(Data(synthetic=sizes)) == "synthetic, 4 train, 3 validation, 2 test pairs, seed 7"


def test_fingerprints_of_copies_are_equal(tmp_path: Path) -> None:
    here, copy = (Data(path=str(write_v2(tmp_path / place))) for place in ("here", "copy"))
    sizes = Synthetic(num_train=4, num_validation=3, num_test=2, seed=7)
    assert fingerprint(here) == fingerprint(copy) != data_name(here)
    assert fingerprint(Data(path="synthetic", synthetic=sizes)).startswith("synthetic, 4 train")
