"""An archive is named by what it holds."""

from pathlib import Path

from csmae.config import Data, Synthetic
from csmae.data.archive_name import data_name, fingerprint
from tests.support.archives import write_pickles, write_v2


def test_the_same_archive_has_the_same_name_wherever_it_lies(tmp_path: Path) -> None:
    names = {data_name(Data(path=str(write_v2(tmp_path / place)))) for place in ("here", "there")}
    assert names == {"BigEarthNet v2, 5 train, 3 validation, 2 test pairs"}


def test_versions_and_fewer_training_pairs_are_told(tmp_path: Path) -> None:
    path = str(write_pickles(tmp_path / "old"))
    assert data_name(Data(path=path)) == "BigEarthNet v1, 5 train, 3 validation, 2 test pairs"
    assert data_name(Data(path=path, max_train_pairs=4)) == "BigEarthNet v1, 4 train, 3 validation, 2 test pairs"
    assert data_name(Data(path=path, max_train_pairs=9)) == data_name(Data(path=path))


def test_synthetic_scenes_say_so_first() -> None:
    sizes = Synthetic(num_train=4, num_validation=3, num_test=2, seed=7)
    assert data_name(Data(synthetic=sizes)) == "synthetic, 4 train, 3 validation, 2 test pairs, seed 7"


def test_a_fingerprint_tells_archives_of_one_name_apart(tmp_path: Path) -> None:
    here, copy = (Data(path=str(write_v2(tmp_path / place))) for place in ("here", "copy"))
    sizes = Synthetic(num_train=4, num_validation=3, num_test=2, seed=7)
    assert fingerprint(here) == fingerprint(copy) != data_name(here)
    assert fingerprint(Data(path="synthetic", synthetic=sizes)).startswith("synthetic, 4 train")
