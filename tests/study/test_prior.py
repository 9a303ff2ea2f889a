"""Priors: what a study file accepts, what they mean, and that they may change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csmae.config import ConfigError
from csmae.console.dry_run import format_dry_run
from csmae.study.domain import parse_domain
from csmae.study.encoding import Encoding
from csmae.study.prior import TruncatedNormal
from csmae.study.space import Space
from csmae.study.study import load_study
from tests.study.test_encoding import BASE, ENTRIES
from tests.study.test_study import assert_rejected, write

CENTERS: dict[str, Any] = {
    "model.variant": "cecd",
    "optim.betas": [0.9, 0.999],
    "optim.micro_batch_size": None,
    "model.patch_size": 8,
    "loss.mim_weight": 1,
    "optim.lr": 1e-4,
    "optim.weight_decay": 0.05,
    "masking.ratio": 0.75,
    "model.decoder_depth": 8,
    "model.decoder_embed_dim": 128,
    "loss.temperature": 0.1,
    "model.sensor_depth": 2,
}


def encoding(*names: str, confidence: str = "medium") -> Encoding:
    """Domains with priors, and those that their conditions name."""
    needed = {*names, *(other for name in names for other in ENTRIES[name].get("when", ()))}
    priors = {name: {"prior": {"center": CENTERS[name], "confidence": confidence}} for name in names}
    return Encoding(Space.parse({name: ENTRIES[name] | priors.get(name, {}) for name in sorted(needed)}, BASE))


def draw(encoder: Encoding, count: int, **options: Any) -> list[dict[str, Any]]:
    return encoder.sample(count, np.random.default_rng(0), **options)


@pytest.mark.parametrize(
    ("name", "entry", "line"),
    [
        (
            "masking.ratio",
            {"float": [0.25, 0.9], "prior": {"center": 0.95}},
            "prior.center 0.95 is outside the domain: float 0.25 to 0.9",
        ),
        (
            "masking.ratio",
            {"float": [0.25, 0.9], "step": 0.05, "prior": {"center": 0.52}},
            "prior.center 0.52 is outside the domain: float 0.25 to 0.9, step 0.05",
        ),
        (
            "model.variant",
            {"choice": ["secd", "cecd"], "prior": {"center": "secs"}},
            'prior.center "secs" is outside the domain: one of "secd", "cecd"',
        ),
        (
            "optim.lr",
            {"float": [1e-5, 1], "prior": {"center": 0.1, "confidence": "sure"}},
            "prior.confidence: input should be 'low', 'medium' or 'high', found 'sure'",
        ),
        (
            "optim.lr",
            {"float": [1e-5, 1], "prior": {"confidence": "low"}},
            "prior.center: field required, found {'confidence': 'low'}",
        ),
        (
            "optim.lr",
            {"float": [1e-5, 1], "prior": 0.1},
            "prior must be {center: value, confidence: low, medium or high}, found 0.1",
        ),
        (
            "optim.lr",
            {"float": [1e-5, 1], "prior": {"center": {}}},
            "prior.center must be a value of the domain, found {}",
        ),
        (
            "optim.lr",
            {"float": [1e-5, 1], "prior": {"centre": 0.1, "center": 0.1}},
            "'prior.centre' is not an option of float; did you mean 'prior.center'?",
        ),
    ],
)
def test_a_wrong_prior_is_one_line(tmp_path: Path, name: str, entry: dict[str, Any], line: str) -> None:
    path = write(tmp_path, {name: entry})
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert str(caught.value) == f"{path}: space key {name!r}: {line}"


def test_a_center_outside_of_a_conditional_domain_is_rejected(tmp_path: Path) -> None:
    temperature = {"float": [0.1, 1], "when": {"loss.mim_weight": "> 0"}, "prior": {"center": 2}}
    space = {"loss.mim_weight": {"float": [0, 4]}, "loss.temperature": temperature}
    assert_rejected(write(tmp_path, space), "'loss.temperature'", "prior.center 2 is outside the domain")


@pytest.mark.parametrize("center", [0.1, "1e-1", 1])
def test_a_center_is_written_as_any_value(center: Any) -> None:
    domain = parse_domain("optim.lr", {"float": [1e-5, 1], "prior": {"center": center}})
    assert domain.prior and domain.fit(domain.prior.center) == float(center)
    assert str(domain.prior) == f"prior {1 if center == 1 else 0.1} with medium confidence"
    assert parse_domain("optim.lr", {"float": [1e-5, 1], "prior": None}).prior is None


def test_a_prior_may_change_when_a_study_is_resumed_and_the_dry_run_shows_it(tmp_path: Path) -> None:
    entry: dict[str, Any] = {"float": [0.25, 0.9]}
    plain = load_study(write(tmp_path, {"masking.ratio": entry}))
    study = load_study(write(tmp_path, {"masking.ratio": {**entry, "prior": {"center": 0.6, "confidence": "high"}}}))
    assert study.definition() == plain.definition()
    assert "  masking.ratio: float 0.25 to 0.9, prior 0.6 with high confidence\n" in format_dry_run(study, None)
    assert "prior" not in format_dry_run(plain, None)


# What priors mean


@pytest.mark.parametrize(("confidence", "width"), [("low", 0.5), ("medium", 0.25), ("high", 0.125)])
def test_draws_have_the_spread_of_the_confidence(confidence: str, width: float) -> None:
    encoder = encoding("model.variant", "optim.lr", "optim.weight_decay", confidence=confidence)
    points = draw(encoder, 20_000)
    columns = encoder.encode(points)[:, 4:].T
    for column, center in zip(columns, (1 / 3, 1 / 6), strict=True):  # of the logarithm of the range, of the range
        grid = np.linspace(0, 1, 1001)
        expected = np.exp(-0.5 * ((grid - center) / width) ** 2)
        assert column.mean() == pytest.approx((grid * expected).sum() / expected.sum(), abs=0.01)
        variance = ((grid - center) ** 2 * expected).sum() / expected.sum()
        assert ((column - center) ** 2).mean() == pytest.approx(variance, rel=0.05)
    centers = sum(point["model.variant"] == "cecd" for point in points) / len(points)
    assert centers == pytest.approx(1 - width + width / 4, abs=0.02)
    others = sum(point["model.variant"] == "secd" for point in points) / len(points)
    assert others == pytest.approx(width / 4, abs=0.02)


@pytest.mark.parametrize("name", CENTERS)
def test_the_center_is_the_likeliest_value_and_densities_are_ratios_to_uniform_draws(name: str) -> None:
    encoder = encoding(name)
    points = [point for point in draw(encoder, 4000, prior_share=0.0) if name in point]
    density = np.exp(encoder.prior_log_density(points))
    assert density.mean() == pytest.approx(1, abs=0.08)  # the integral over the uniform draws
    center = points[0] | {name: CENTERS[name]}
    assert np.exp(encoder.prior_log_density([center]))[0] >= density.max() * 0.999 > 1


@pytest.mark.parametrize("name", ["model.patch_size", "model.decoder_depth", "masking.ratio", "loss.mim_weight"])
def test_the_density_of_a_value_is_how_often_it_is_drawn(name: str) -> None:
    encoder = encoding(name)
    points, values = draw(encoder, 20_000), Space.parse(ENTRIES, BASE).domains[name].values
    for value in values:
        frequency = sum(point[name] == value for point in points) / len(points)
        density = np.exp(encoder.prior_log_density([points[0] | {name: value}]))[0]
        assert frequency == pytest.approx(density / len(values), abs=0.015)


def test_a_domain_counts_only_where_it_is_active() -> None:
    encoder = encoding("loss.temperature")
    points = draw(encoder, 500)
    density = encoder.prior_log_density(points)
    assert {value == 0 for value, point in zip(density, points, strict=True) if "loss.temperature" not in point} == {
        True
    }
    assert sum(density != 0) == sum("loss.temperature" in point for point in points)
    assert draw(encoder, 500) == points


def test_the_share_of_draws_from_the_prior() -> None:
    encoder = encoding(*CENTERS, confidence="high")
    means = [encoder.prior_log_density(draw(encoder, 2000, prior_share=share)).mean() for share in (0.0, 0.5, 1.0)]
    assert means[0] < means[1] < means[2]
    points = draw(encoder, 500, prior_share=0.0)
    density, mixed = (np.exp(encoder.prior_log_density(points, share)) for share in (1.0, 0.25))
    assert density.min() < 1e-3 and mixed == pytest.approx(0.25 * density + 0.75)
    assert means[1] == pytest.approx((means[0] + means[2]) / 2, rel=0.2)


@pytest.mark.parametrize("center", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("width", [0.5, 0.125])
def test_a_truncated_normal_has_mass_one_and_no_draws_outside(center: float, width: float) -> None:
    distribution, edges = TruncatedNormal(center, width), np.linspace(0, 1, 101)
    draws = distribution.draw(50_000, np.random.default_rng(0))
    assert draws.min() >= 0 and draws.max() <= 1
    mass = np.exp(distribution.mean_log_density(edges[:-1], edges[1:])) / 100
    assert mass.sum() == pytest.approx(1)
    assert np.histogram(draws, edges)[0] / len(draws) == pytest.approx(mass, abs=0.005)
    middle = np.exp(distribution.log_density((edges[:-1] + edges[1:]) / 2)) / 100
    assert np.log(middle) == pytest.approx(np.log(mass), abs=0.02)
