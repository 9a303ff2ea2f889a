"""The configuration: the published defaults, the names, and one clear line for what cannot be."""

from pathlib import Path

import pytest

from csmae.config import Config, ConfigError, Model
from csmae.settings import FIELDS, Names, flatten, load_yaml, merge, parse_assignments, parse_config


def test_the_defaults_are_the_published_sesd() -> None:
    config = Config()
    model = config.model
    assert (model.embed_dim, model.num_heads, model.sensor_depth, model.cross_depth) == (768, 12, 10, 2)
    assert (model.decoder_embed_dim, model.decoder_depth, model.decoder_num_heads) == (512, 8, 16)
    assert (config.masking.ratio, config.masking.strategy, config.masking.reconstruction) == (0.5, "random", "disjoint")
    assert (config.loss.umr_weight, config.loss.cmr_weight, config.loss.mim_weight, config.loss.mde_weight) == (
        1,
        1,
        1,
        0,
    )
    assert (config.optim.lr, config.optim.weight_decay, config.optim.betas) == (1e-4, 0.05, (0.9, 0.95))
    assert (config.optim.batch_size, config.optim.warmup_epochs, config.train.epochs) == (128, 10, 150)


@pytest.mark.parametrize(
    ("variant", "depths"), [("cecd", (0, 12)), ("cesd", (0, 12)), ("secd", (10, 2)), ("sesd", (10, 2))]
)
def test_a_variant_fills_in_the_published_depths(variant: str, depths: tuple[int, int]) -> None:
    model = parse_config({"model": {"variant": variant}}, "test").model
    assert (model.sensor_depth, model.cross_depth) == depths


@pytest.mark.parametrize(
    ("size", "width", "heads"), [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12), ("large", 1024, 16)]
)
def test_a_size_fills_in_width_and_heads_that_are_omitted(size: str, width: int, heads: int) -> None:
    model = parse_config({"model": {"size": size}}, "test").model
    assert (model.embed_dim, model.num_heads) == (width, heads)
    free = parse_config({"model": {"size": size, "embed_dim": 64, "num_heads": 4, "sensor_depth": 1}}, "test").model
    assert (free.embed_dim, free.num_heads, free.sensor_depth) == (64, 4, 1)


def test_a_written_configuration_reads_back_the_same() -> None:
    config = parse_config({"model": {"variant": "cecd", "size": "nano"}, "masking": {"ratio": 0.7}}, "test")
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"masking": {"rato": 0.5}},
            "'masking.rato' is not a field of the configuration; did you mean 'masking.ratio'?",
        ),
        ({"masking": {"ratio": "half"}}, "masking.ratio: input should be a valid number"),
        ({"train": {"epochs": True}}, "train.epochs must not be true or false, found True"),
        ({"masking": {"ratio": 1.0}}, "masking.ratio: input should be less than 1"),
        ({"masking": {"ratio": 0.995}}, "keeps 0 of 64"),
        ({"model": {"size": ["base"]}}, "model.size: input should be 'nano', 'tiny',"),
        ({"model": {"patch_size": 16}}, "16 does not divide 120 (divisors: 8, 10, 12, 15, 20, 24, 30, 40, 60)"),
        ({"model": {"num_heads": 7}}, "model.num_heads must divide model.embed_dim: 7 does not divide 768"),
        ({"model": {"decoder_num_heads": 7}}, "7 does not divide 512"),
        ({"model": {"embed_dim": 90, "num_heads": 3}}, "multiple of 4"),
        ({"model": {"variant": "cecd", "sensor_depth": 3}}, "model.sensor_depth must be 0"),
        ({"model": {"sensor_depth": 0}}, "model.sensor_depth must be at least 1"),
        ({"model": {"variant": "xexd"}}, "model.variant: input should be 'cecd', 'cesd', 'secd' or 'sesd'"),
        ({"loss": {"umr_weight": 0, "cmr_weight": 0, "mim_weight": 0}}, "at least one of"),
        ({"loss": {"cmr_weight": 0, "mim_weight": 0, "s1_weight": 0}}, "leaves the S1 encoder without a loss"),
        ({"loss": {"umr_weight": 0, "mim_weight": 0, "s1_weight": 0}}, "leaves the S2 encoder without a loss"),
        ({"loss": {"mim_weight": float("nan")}}, "loss.mim_weight: input should be a finite number"),
        ({"optim": {"lr": 0}}, "optim.lr: input should be greater than 0"),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas must lie in [0, 1)"),
        ({"train": {"epochs": 5}}, "optim.warmup_epochs must be smaller than train.epochs: found 10 of 5"),
        ({"data": {"s2_mean": [1, 2]}}, "data.s2_mean must have 10 values, one per band: found 2"),
        ({"data": {"s1_std": [1, 0]}}, "data.s1_std must be positive"),
        ({"model": 3}, "model: input should be a valid dictionary"),
    ],
)
def test_an_invalid_value_is_rejected_with_one_line_that_names_it(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "run.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("run.yaml: ")
    assert text in lines[0]


def test_dotted_names_and_nested_sections_are_equivalent() -> None:
    nested = merge({"masking": {"ratio": 0.5}}, {"masking.strategy": "random", "data.synthetic.seed": 3})
    assert dict(flatten(nested)) == {"masking.ratio": 0.5, "masking.strategy": "random", "data.synthetic.seed": 3}
    assert "data.synthetic.num_train" in FIELDS.known


def test_set_options_are_read_as_yaml() -> None:
    values = parse_assignments(
        ["masking.ratio=0.7", "loss.norm_pix=true", "optim.betas=[0.9, 0.99]", "optim.lr=1.0e-3"]
    )
    assert values["masking.ratio"] == 0.7
    assert values["loss.norm_pix"] is True
    assert parse_config(merge({}, values), "test").optim.betas == (0.9, 0.99)


def test_other_names_of_set_options_have_their_own_error_text() -> None:
    others = Names("a setting of the search", ("num_trials", "seed"), "search.")
    assert parse_assignments(["search.seed=1", "masking.ratio=0.7"], others) == {"search.seed": 1, "masking.ratio": 0.7}
    with pytest.raises(ConfigError) as caught:
        parse_assignments(["search.num_trial=5"], others)
    expected = "'search.num_trial' is not a setting of the search; did you mean 'search.num_trials'?"
    assert str(caught.value) == f"--set search.num_trial=5: {expected}"
    with pytest.raises(ConfigError, match=r"'search' is not a field of the configuration$"):
        parse_assignments(["search=5"], others)


@pytest.mark.parametrize("text", ["masking.ratio", "masking.rato=1", "masking.ratio={"])
def test_a_wrong_set_option_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--set {text.split('{')[0]}"):
        parse_assignments([text])


@pytest.mark.parametrize(
    ("content", "text"), [(b"a: [", "is not YAML"), (b"- 1", "must hold sections"), (b"\xff", "is not YAML")]
)
def test_a_file_that_is_not_a_configuration_is_rejected(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        load_yaml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "none.yaml")


def test_a_model_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Model().embed_dim = 3  # type: ignore[misc]
