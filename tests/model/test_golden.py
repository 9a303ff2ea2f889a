"""Agreement with tensors that the published implementation computed."""

import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from csmae.config import Data, Loss, Masking
from csmae.data.archive import open_archive
from csmae.data.loader import batches
from csmae.data.transforms import upsample
from csmae.encoders import EncoderError, load_published
from csmae.model.csmae import CSMAE
from csmae.model.published import convert_state, infer_model, rename
from csmae.retrieval.scores import label_scores, rank_directions
from csmae.sensors import S1_BANDS, S2_BANDS

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(os.environ.get("CSMAE_GOLDEN", ROOT.parent / "shared" / "parity"))
CASES = sorted(p for p in GOLDEN.glob("*.safetensors") if p.stem not in ("reader", "retrieval"))

needs_golden = pytest.mark.skipif(not CASES, reason=f"no golden tensors in {GOLDEN} (set CSMAE_GOLDEN)")


class Case:
    """One golden file: our network with its weights, its inputs and the expected outputs."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.settings: dict[str, Any] = json.loads(file.metadata()["config"])
        self.tensors = load_file(path)
        state = self.part("state.")
        self.model = CSMAE(infer_model(state, self.settings), _masking(self.settings), _loss(self.settings))
        names = self.model.state_dict().keys()
        ours = convert_state(state)
        assert all(name.startswith("decoders.") for name in ours.keys() - names), "only unused decoders are not built"
        self.model.load_state_dict({name: tensor for name, tensor in ours.items() if name in names})
        x = self.tensors["input.x"]
        noise = self.tensors["input.noise_s1"]
        self.inputs = x[:, 10:], x[:, :10], noise, self.tensors.get("input.noise_s2", noise)

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def _masking(settings: dict[str, Any]) -> Masking:
    return Masking(
        ratio=settings["mask_ratio"],
        strategy=settings["masking_strategy"],
        reconstruction=settings["reconstruction_strategy"],
    )


def _loss(settings: dict[str, Any]) -> Loss:
    weights = {f"{name}_weight": float(settings[f"apply_{name}_loss"]) for name in ("umr", "cmr", "mim", "mde")}
    return Loss(**weights, temperature=settings["mim_temp"], norm_pix=settings["norm_pix_loss"])


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def agrees(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=rtol, atol=rtol * max(scale, 1e-3))


@needs_golden
def test_unmasked_features_agree(case: Case) -> None:
    s1, s2, _, _ = case.inputs
    with torch.no_grad():
        features = case.model.eval().encoder.features({"s1": s1, "s2": s2})
    for sensor in ("s1", "s2"):
        expected = case.tensors[f"expect.encode_{sensor}"]
        if expected.isnan().any():  # with disjoint masks the published encoder has no S2 patch at inference
            assert case.settings["masking_strategy"] == "disjoint"
            assert features[sensor].isfinite().all()
        else:
            agrees(features[sensor], expected)


@needs_golden
def test_masks_features_and_predictions_agree(case: Case) -> None:
    result = case.model.reconstruct(*case.inputs)
    with torch.no_grad():
        features = case.model.features(*case.inputs)
    for sensor, features_bd in zip(("s1", "s2"), features, strict=True):
        agrees(result.masks[sensor].mask_bl, case.tensors[f"expect.mask_{sensor}"])
        agrees(features_bd, case.tensors[f"expect.feats_{sensor}"])
    expected = case.part("expect.pred_")
    compared = set()
    for name, prediction in expected.items():
        target, source = name.split("_from_")
        if (source, target) in result.predictions:
            agrees(result.predictions[source, target], prediction)
            compared.add((source, target))
    loss = case.model.loss
    in_loss = {(s, t) for s in ("s1", "s2") for t in loss.targets if (loss.umr_weight if s == t else loss.cmr_weight)}
    assert in_loss <= compared


@needs_golden
def test_losses_and_gradients_agree(case: Case) -> None:
    terms = case.model(*case.inputs)
    expected = case.part("expect.metric.train_")
    published = {"mim_loss": "mim", "mde_loss": "mde"}
    for target in ("s1", "s2"):
        for source in ("s1", "s2"):
            ours = f"umr_{target}" if source == target else f"cmr_{source}_to_{target}"
            published[f"reconstruction_loss_{target}_from_{source}"] = ours
    compared = {ours for name, ours in published.items() if name in expected}
    assert compared == set(terms) - {"loss"}
    for name, ours in published.items():
        if name in expected:
            agrees(terms[ours], expected[name])
    agrees(terms["loss"], case.tensors["expect.loss_total"])

    terms["loss"].backward()
    norms = {name: p.grad.norm() for name, p in case.model.named_parameters() if p.grad is not None}
    golden = {rename(name): norm for name, norm in case.part("grad_norm.").items()}
    assert set(norms) == {name for name, norm in golden.items() if norm > 0}
    for name in norms:
        agrees(norms[name], golden[name], rtol=1e-4)


@needs_golden
def test_masks_of_the_loss_agree(case: Case) -> None:
    masks = case.model.reconstruct(*case.inputs).masks
    for target, source in (("s1", "s2"), ("s2", "s1")):
        name = f"expect.mask_{target}_from_{source}"
        if name in case.tensors:
            agrees(masks[source].mask_bl, case.tensors[name])


@pytest.mark.skipif(not (GOLDEN / "retrieval.safetensors").exists(), reason=f"no retrieval.safetensors in {GOLDEN}")
def test_retrieval_scores_agree() -> None:
    path = GOLDEN / "retrieval.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, expected = load_file(path), json.loads(metadata["expect"])
    queries, archive = (
        {s: torch.nn.functional.normalize(tensors[f"{part}_{s}"], dim=1) for s in ("s1", "s2")}
        for part in ("query", "archive")
    )
    rankings = rank_directions(queries, archive, int(metadata["k"]))
    for direction, ranked in rankings.items():
        scores = label_scores(tensors["query_labels"], tensors["archive_labels"], ranked)
        assert scores == pytest.approx(expected[direction], rel=1e-5), direction
    assert set(rankings) == set(expected)


PUBLISHED = GOLDEN / "published"

needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"no published weights in {PUBLISHED}")


@needs_published
def test_the_published_checkpoint_computes_the_published_features() -> None:
    expected = load_file(PUBLISHED / "expect.safetensors")
    encoder = load_published(PUBLISHED / "weights.ckpt", PUBLISHED / "cfg.yaml")
    x = expected["x"]
    with torch.no_grad():
        features = encoder.network.features({"s1": x[:, 10:], "s2": x[:, :10]})
    for sensor in ("s1", "s2"):
        agrees(features[sensor], expected[sensor])
    assert encoder.transpose, "the published weights were trained on transposed images"


@needs_published
def test_a_published_configuration_without_sizes_means_12_heads(tmp_path: Path) -> None:
    settings = yaml.safe_load((PUBLISHED / "cfg.yaml").read_text())
    settings.pop("backbone", None)
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(settings))
    assert load_published(PUBLISHED / "weights.ckpt", tmp_path / "cfg.yaml").model.num_heads == 12


def write_run(folder: Path, state: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    """A training run's folder as the published code leaves it."""
    kwargs = {name: settings[name] for name in ("img_size", "patch_size", "num_heads", "global_pool")}
    method = {"decoder_num_heads": settings["decoder_num_heads"], "mask_ratio": settings["mask_ratio"]}
    arguments = {"backbone": {"name": "vit_tiny", "kwargs": kwargs}, "method_kwargs": method, "max_epochs": 150}
    (folder / "args.yaml").write_text(yaml.safe_dump(arguments))
    path = folder / "csmae-a1b2c3d4-ep=149.ckpt"
    torch.save({"epoch": 149, "global_step": 9, "state_dict": state, "optimizer_states": [{"state": {}}]}, path)
    return path


@needs_golden
def test_the_checkpoint_of_a_published_training_run_is_read(case: Case, tmp_path: Path) -> None:
    encoder = load_published(write_run(tmp_path, case.part("state."), case.settings))
    s1, s2, _, _ = case.inputs
    with torch.no_grad():
        features = encoder.network.features({"s1": s1, "s2": s2})
    for sensor in ("s1", "s2"):
        expected = case.tensors[f"expect.encode_{sensor}"]
        if not expected.isnan().any():
            agrees(features[sensor], expected)


@needs_golden
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("backbone.norm.bias"), "Missing key.*encoder.norm.bias"),
        (lambda state: state.pop("backbone.pos_embed"), "'backbone.pos_embed' is missing"),
        (lambda state: state.update({"backbone.norm.scale": torch.zeros(3)}), "Unexpected key.*encoder.norm.scale"),
        (
            lambda state: state.update({"projector.weight": torch.zeros(3)}),
            "'projector.weight' is not a parameter of a CSMAE",
        ),
        (
            lambda state: state.update({"backbone.cls_token": torch.zeros(1, 1, 7)}),
            "size mismatch for encoder.cls_token",
        ),
        (lambda state: state.update({"backbone.patch_embed.proj.weight": 3}), "do not make a CSMAE"),
    ],
)
def test_a_published_checkpoint_is_read_completely_or_rejected(
    change: Callable[[dict[str, Tensor]], object], text: str, tmp_path: Path
) -> None:
    case = Case(CASES[0])
    state = case.part("state.")
    change(state)
    path = write_run(tmp_path, state, case.settings)
    with pytest.raises(EncoderError, match=rf"{path.name}: is not a published checkpoint \(.*{text}") as caught:
        load_published(path)
    assert "\n" not in str(caught.value)


@needs_golden
def test_a_truncated_published_checkpoint_and_one_without_settings_are_rejected(tmp_path: Path) -> None:
    case = Case(CASES[0])
    path = write_run(tmp_path, case.part("state."), case.settings)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(EncoderError, match="is not a published checkpoint"):
        load_published(path)
    (tmp_path / "args.yaml").unlink()
    with pytest.raises(EncoderError, match=r"needs one of cfg.yaml, args.yaml, args.json beside it"):
        load_published(path)


REAL_V1 = Path(os.environ.get("CSMAE_REAL_DATA", ROOT.parent / "shared" / "data")) / "bigearthnet-v1"


@pytest.mark.skipif(
    not ((GOLDEN / "reader.safetensors").exists() and REAL_V1.exists()),
    reason=f"no reader.safetensors in {GOLDEN} (set CSMAE_GOLDEN) or no sample in {REAL_V1} (set CSMAE_REAL_DATA)",
)
def test_the_v1_reader_stacks_the_published_images_and_labels() -> None:
    path = GOLDEN / "reader.safetensors"
    with safe_open(path, "pt") as file:
        bands = file.metadata()["bands"].split(",")
    expected = load_file(path)
    names = [name for name in expected if not name.endswith(".labels")]
    split = open_archive(Data(path=str(REAL_V1))).select(np.array(names, dtype=np.bytes_), str(path))
    with closing(batches(split, [np.arange(len(names))])) as loaded:
        batch = next(loaded)
        s2 = torch.cat([batch.s2_10m.float(), upsample(batch.s2_20m.float(), 120)], dim=1)
        ours = dict(zip((*S2_BANDS, *S1_BANDS), torch.cat([s2, batch.s1], dim=1).unbind(1), strict=True))
    labels = split.labels()
    for row, name in enumerate(names):
        for channel, band in enumerate(bands):
            torch.testing.assert_close(ours[band][row], expected[name][channel], rtol=1e-5, atol=2e-3)
        assert labels[row].tolist() == expected[f"{name}.labels"].bool().tolist()
