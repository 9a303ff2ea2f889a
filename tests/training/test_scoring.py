"""Validation scores with damaged pairs and without labels."""

from pathlib import Path

import pytest
import torch

from csmae.config import ConfigError
from csmae.data.split import Split
from csmae.encoders import SensorEncoder
from csmae.model.csmae import build_model
from csmae.retrieval.embed import embed
from csmae.training.scoring import validation_scores
from tests.conftest import small_config
from tests.support.archives import names_of, open_folder, put, without_labels, write_v2

DAMAGED = (1, 9)
"""Pairs of the archive: one is a query, the other is alone in its batch and would be retrieved."""


def archive_with_damage(folder: Path) -> Split:
    """All ten pairs of a v2 archive; the S1 image of one and the S2 image of another are damaged."""
    put(write_v2(folder), {names_of(DAMAGED[0])[2]: b"damaged!!", names_of(DAMAGED[1])[0]: b"damaged!!"})
    return every_pair(folder)


def every_pair(folder: Path) -> Split:
    for file in ("train.csv", "val.csv", "test.csv"):
        (folder / file).write_text("".join(f"{names_of(number)[0]}\n" for number in range(10)))
    return open_folder(folder, on_error="skip").split("validation")


def scores(split: Split, k: int = 3) -> dict[str, float]:
    config = small_config(eval__k=k, eval__batch_size=3)
    with torch.inference_mode():
        encoder = SensorEncoder.from_model(build_model(config).eval(), config)
        return validation_scores(embed(encoder, split, config.eval.batch_size), split, k)


def test_damaged_pairs_are_left_out_of_every_score(tmp_path: Path) -> None:
    damaged = archive_with_damage(tmp_path / "damaged")
    whole = every_pair(write_v2(tmp_path / "whole"))
    intact = whole.take([number for number in range(10) if number not in DAMAGED])
    assert scores(damaged) == pytest.approx(scores(intact))
    assert scores(damaged) != pytest.approx(scores(whole))
    assert damaged.damaged_rows().tolist() == list(DAMAGED)


def test_too_few_intact_pairs_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval.k 5 .* without the damaged pairs there are 4 and 4"):
        scores(archive_with_damage(tmp_path), k=5)


def test_an_archive_without_labels_has_only_partner_scores(tmp_path: Path) -> None:
    labeled = scores(every_pair(write_v2(tmp_path / "labeled")))
    bare = scores(every_pair(without_labels(write_v2(tmp_path / "bare"))))
    assert set(bare) == {"val/recall_at_1", "val/mrr"}
    assert bare == pytest.approx({name: labeled[name] for name in bare})
