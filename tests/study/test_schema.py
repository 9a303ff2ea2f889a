"""The JSON schema of a study file: up to date, true for every file in spaces, and strict."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from csmae.settings import FIELDS
from csmae.study.schema import study_schema
from csmae.study.study import FIXED
from tests.study.test_study import SPACES

SCHEMA = SPACES[0].parent / "study.schema.json"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def test_the_schema_beside_the_spaces_is_up_to_date() -> None:
    assert json.loads(SCHEMA.read_text()) == study_schema(), "run: csmae schema > spaces/study.schema.json"


def test_the_schema_is_a_valid_one() -> None:
    jsonschema.Draft202012Validator.check_schema(study_schema())


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_file_in_spaces_names_the_schema_and_fits_it(
    validator: jsonschema.Draft202012Validator, path: Path
) -> None:
    assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA.name}"
    validator.validate(yaml.safe_load(path.read_text()))


def test_the_schema_describes_every_field_that_a_space_may_vary() -> None:
    space = study_schema()["properties"]["space"]["properties"]
    assert list(space) == [name for name in FIELDS.known if not name.startswith(FIXED)]
    assert all(entry["description"] for entry in space.values())


SPACE = {"masking.ratio": {"float": [0.3, 0.9]}}


@pytest.mark.parametrize(
    "content",
    [
        {"space": {"masking.strategy": {"choice": ["random", "disjoint"], "when": {"loss.mim_weight": "> 0"}}}},
        {"space": {"optim.betas": {"choice": [[0.9, 0.95], [0.9, 0.99]]}}},
        {"space": {"optim.lr": {"float": [1e-5, 1e-3], "log": True, "when": {"model.variant": ["secd", "sesd"]}}}},
        {"space": {"loss.mim_weight": {"int": [0, 4], "when": {"model.size": "tiny", "optim.betas": [[0.9, 0.95]]}}}},
        {"space": {"model.decoder_depth": {"int": [1, 4], "step": None, "when": None}}},
        {"space": {"optim.lr": {"float": [0.1, 1], "when": {"loss.mim_weight": "< inf"}}}},
        {"space": SPACE, "base": {"optim.lr": 0.1, "model": {"size": "nano"}}},
        {"space": SPACE, "search": {"constraints": {"cost/params": "<= 30e6"}, "time_limit": "1.5h"}},
    ],
)
def test_valid_study_files_fit(validator: jsonschema.Draft202012Validator, content: dict[str, Any]) -> None:
    validator.validate(content)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"space": {}},
        {"space": SPACE, "spaces": {}},
        {"space": {"masking.rato": {"float": [0.3, 0.9]}}},
        {"space": {"eval.k": {"int": [5, 10]}}},
        {"space": {"masking.ratio": {"flaot": [0.3, 0.9]}}},
        {"space": {"masking.ratio": {"float": [0.3]}}},
        {"space": {"masking.ratio": {"float": [0.3, 0.9], "lgo": True}}},
        {"space": {"masking.ratio": {"float": [0.3, 0.9], "choice": [0.5]}}},
        {"space": {"masking.strategy": {"choice": ["random", "rnd"]}}},
        {"space": {"masking.strategy": {"choice": []}}},
        {"space": {"model.decoder_depth": {"float": [1, 4]}}},
        {"space": {"optim.lr": {"float": [0.1, 1], "when": {"loss.x": 1}}}},
        {"space": {"optim.lr": {"float": [0.1, 1], "when": {"loss.mim_weight": "> much"}}}},
        {"space": SPACE, "base": {"masking": {"rato": 1}}},
        {"space": SPACE, "base": {"masking.rato": 1}},
        {"space": SPACE, "search": {"num_trails": 3}},
        {"space": SPACE, "search": {"objectives": {"val/f1_meen": "maximize"}}},
        {"space": SPACE, "search": {"constraints": {"cost/params": "< 1"}}},
        {"space": SPACE, "search": {"hang_timeout": "soon"}},
    ],
)
def test_invalid_study_files_do_not_fit(validator: jsonschema.Draft202012Validator, content: dict[str, Any]) -> None:
    assert not validator.is_valid(content)
