"""An untrained encoder, for the tests of this folder."""

from pathlib import Path

import pytest

from csmae.encoders import SensorEncoder
from csmae.model.csmae import build_model
from tests.conftest import small_config


@pytest.fixture(scope="module")
def encoder() -> SensorEncoder:
    config = small_config()
    return SensorEncoder.from_model(build_model(config), config).eval()


@pytest.fixture(scope="module")
def encoder_dir(encoder: SensorEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    encoder.save(folder)
    return folder
