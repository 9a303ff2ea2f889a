"""The configuration of one training run: typed, frozen and validated.

The defaults are the published SESD (arXiv 2401.07782). A dotted name such as ``masking.ratio`` is the YAML key, the
Optuna and MLflow parameter and the ``--set`` option alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from csmae import sensors


class ConfigError(ValueError):
    """An invalid setting, or another error that a user can fix: the text says what, where and what to do."""


def one_line(error: object, limit: int | None = 200) -> str:
    """The text of an error, without line breaks and cut to a length, as a part of a message."""
    return " ".join(str(error).split())[:limit]


class MayChange(Enum):
    """When a field may differ from the value that a study or a training was started with. A mark on the field."""

    NEVER = "never"
    """The field decides what is learned, or what a score means. The default of a field without a mark."""
    ON_CHECKPOINT_COPY = "on checkpoint copy"
    """When a training starts from a copy of another one's checkpoint. The field decides what is learned, but neither the data
    nor the length of the training, nor the shapes of the parameters."""
    ON_TRAINING_RESUME = "on training resume"
    """When a training is resumed, but not within a study, whose scores would no longer compare."""
    ON_STUDY_RESUME = "on study resume"
    """When a study or a training is resumed: nothing but rounding depends on the field. It says where the data are, what
    happens to a damaged pair, or how a step is computed."""
    IF_LARGER = "if larger"
    """When a study or a training is resumed, if the new value is larger: trainings continue further."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    may_change: ClassVar[MayChange] = MayChange.NEVER
    """The mark of fields without one of their own."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_scalar(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("must not be true or false")
        if isinstance(value, str) and field.annotation in (int, int | None):
            return _whole(value)
        return value


def changeable(when: MayChange, section: type[Section] | None = None, prefix: str = "") -> frozenset[str]:
    """Dotted names of the fields that may change in a resumed study, a resumed training, or a copy of a checkpoint.

    Args:
        when: ``MayChange.ON_STUDY_RESUME``, or another mark, with which the former is included.
        section: Whose fields; the whole configuration by default.
        prefix: Of the names.
    """
    section, marks = section or Config, {MayChange.ON_STUDY_RESUME, when}
    found: set[str] = set()
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= changeable(when, field.annotation, f"{prefix}{name}.")
        elif next((mark for mark in field.metadata if isinstance(mark, MayChange)), section.may_change) in marks:
            found.add(prefix + name)
    return frozenset(found)


def can_change_in_training(name: str) -> bool:
    """Return whether a field may change while a network is trained: a trial that copies a checkpoint may give it another value.

    A weight of a loss must stay zero or stay positive, because the network has only the parts that a loss reads.

    Args:
        name: Dotted, such as ``optim.lr``.
    """
    return name in changeable(MayChange.ON_CHECKPOINT_COPY)


def with_defaults(written: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give a configuration that an earlier version wrote the defaults of the fields that were added since."""
    try:
        return Config.model_validate(dict(written)).model_dump(mode="json")
    except ValidationError:  # it names a field that was removed since: a comparison shows it
        return written


def _whole(text: str) -> str | int:
    """Convert text to a whole number if it is one: YAML reads 1e3 as text."""
    try:
        return int(number) if (number := float(text)).is_integer() else text
    except (ValueError, OverflowError):
        return text


class Synthetic(Section):
    """The synthetic archive: scenes drawn from land-cover classes, written once to disk as a v2 archive."""

    num_train: int = Field(1024, ge=1)
    """Scenes of the training split."""
    num_validation: int = Field(512, ge=1)
    """Scenes of the validation split."""
    num_test: int = Field(512, ge=1)
    """Scenes of the test split."""
    seed: int = Field(0, ge=0)
    """Seed of every scene; the same seed and sizes give the same bytes."""


class Data(Section):
    """Where the pairs come from, and their augmentation."""

    path: Annotated[str, MayChange.ON_STUDY_RESUME] = Field("synthetic", min_length=1)
    """Folder of a BigEarthNet archive (v1 or v2; the version is detected), or ``synthetic``."""
    splits_dir: Annotated[str | None, MayChange.ON_STUDY_RESUME] = None
    """Folder of ``train.csv``, ``val.csv``, ``test.csv`` (one S2 patch name per line) to use instead of the archive's."""
    on_error: Annotated[Literal["raise", "skip"], MayChange.ON_STUDY_RESUME] = "raise"
    """What happens to a damaged pair: it ends the run, or it is reported and replaced by another one of its batch."""
    max_train_pairs: int | None = Field(None, ge=1)
    """Pairs of the training split to use, drawn with ``train.seed``; null means all."""
    horizontal_flip: Annotated[float, MayChange.ON_CHECKPOINT_COPY] = Field(0.5, ge=0, le=1)
    """Probability of mirroring both images of a pair left to right."""
    vertical_flip: Annotated[float, MayChange.ON_CHECKPOINT_COPY] = Field(0.5, ge=0, le=1)
    """Probability of mirroring both images of a pair top to bottom."""
    s1_mean: tuple[float, ...] = sensors.S1_MEAN
    """Mean of each S1 band, dB, order VH VV."""
    s1_std: tuple[float, ...] = sensors.S1_STD
    """Standard deviation of each S1 band, dB, > 0."""
    s2_mean: tuple[float, ...] = sensors.S2_MEAN
    """Mean of each S2 band, reflectance times 10,000, order B02 B03 B04 B08 B05 B06 B07 B11 B12 B8A."""
    s2_std: tuple[float, ...] = sensors.S2_STD
    """Standard deviation of each S2 band, > 0."""
    synthetic: Synthetic = Synthetic()
    """Size and seed of the synthetic archive; used if ``path`` is ``synthetic``."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, length in (("s1_mean", 2), ("s1_std", 2), ("s2_mean", 10), ("s2_std", 10)):
            values = getattr(self, name)
            if len(values) != length:
                raise ConfigError(f"data.{name} must have {length} values, one per band: found {len(values)}")
            if name.endswith("std") and min(values) <= 0:
                raise ConfigError(f"data.{name} must be positive: found {min(values)}")
        return self


Size = Literal["nano", "tiny", "small", "base", "large"]
Variant = Literal["cecd", "cesd", "secd", "sesd"]

SIZES: dict[str, dict[str, int]] = {
    "nano": {"embed_dim": 96, "num_heads": 3, "decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4},
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
    "large": {"embed_dim": 1024, "num_heads": 16},
}
"""Widths and heads by size; ``nano`` is for CPUs, the others are the usual ViT sizes."""

DEPTHS = {"nano": 4, "tiny": 12, "small": 12, "base": 12, "large": 24}
"""Encoder blocks that a token passes, by size."""

CROSS_DEPTH = 2
"""Shared blocks after the sensor-specific ones in the published SE variants."""


class Model(Section):
    """The network. ``variant`` and ``size`` fill in the numbers that are omitted."""

    variant: Variant = "sesd"
    """Common (c) or specific (s) encoder (e) and decoder (d)."""
    size: Size = "base"
    """Fills in widths, heads and depths."""
    img_size: int = Field(sensors.IMAGE_SIZE, ge=1)
    """Pixels along a side of the image."""
    patch_size: int = Field(15, ge=1)
    """Pixels along a side of a patch; divides ``img_size``."""
    embed_dim: int = Field(768, ge=4)
    """Width of the encoder's tokens."""
    num_heads: int = Field(12, ge=1)
    """Attention heads of the encoder; divides ``embed_dim``."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Width of a block's hidden layer over its token width."""
    sensor_depth: int = Field(10, ge=0)
    """Sensor-specific blocks; 0 exactly if the encoder is common."""
    cross_depth: int = Field(2, ge=0)
    """Blocks shared by both sensors, after the sensor-specific ones."""
    pooling: Literal["avg", "cls"] = "avg"
    """Feature of an image: mean of its patch tokens, or its class token."""
    decoder_embed_dim: int = Field(512, ge=4)
    """Width of the decoder's tokens."""
    decoder_depth: int = Field(8, ge=1)
    """Blocks of a decoder."""
    decoder_num_heads: int = Field(16, ge=1)
    """Attention heads of a decoder; divides ``decoder_embed_dim``."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        size, variant = values.get("size", "base"), values.get("variant", "sesd")
        if size not in get_args(Size) or variant not in get_args(Variant):
            return values  # the fields' own checks reject it
        common = variant.startswith("ce")
        cross = DEPTHS[size] if common else CROSS_DEPTH
        depths = {"cross_depth": cross, "sensor_depth": 0 if common else DEPTHS[size] - CROSS_DEPTH}
        return {**SIZES[size], **depths, **values}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.img_size % self.patch_size:
            divisors = ", ".join(str(d) for d in range(8, self.img_size // 2 + 1) if self.img_size % d == 0)
            raise ConfigError(
                f"model.patch_size must divide model.img_size: {self.patch_size} does not divide {self.img_size} (divisors: {divisors})"
            )
        for prefix in ("", "decoder_"):
            dim, heads = getattr(self, f"{prefix}embed_dim"), getattr(self, f"{prefix}num_heads")
            if dim % heads:
                raise ConfigError(
                    f"model.{prefix}num_heads must divide model.{prefix}embed_dim: {heads} does not divide {dim}"
                )
            if dim % 4:
                raise ConfigError(
                    f"model.{prefix}embed_dim must be a multiple of 4 for 2-D sin-cos positions: found {dim}"
                )
        common = self.variant.startswith("ce")
        if common != (self.sensor_depth == 0):
            want = "0 (a common encoder has no sensor-specific blocks)" if common else "at least 1"
            raise ConfigError(
                f"model.sensor_depth must be {want} for variant {self.variant}: found {self.sensor_depth}"
            )
        if self.sensor_depth + self.cross_depth == 0:
            raise ConfigError("model.cross_depth must be at least 1 if model.sensor_depth is 0: found 0")
        return self

    @property
    def num_patches(self) -> int:
        """Number of patches of an image, L."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def common_decoder(self) -> bool:
        """Whether one decoder trunk serves both target sensors."""
        return self.variant.endswith("cd")


class Masking(Section):
    """Which patches the encoder sees."""

    may_change: ClassVar[MayChange] = MayChange.ON_CHECKPOINT_COPY

    ratio: float = Field(0.5, gt=0, lt=1)
    """Share of the patches hidden from the encoder."""
    strategy: Literal["identical", "random", "disjoint"] = "random"
    """Which patches S2 keeps, compared with S1: the same ones, an independent draw, or exactly those that S1 lacks."""
    reconstruction: Literal["disjoint", "identical"] = "disjoint"
    """Patches in the cross-modal loss: those hidden in the source image, or those visible in it."""


class Loss(Section):
    """Weights of the loss terms; a term of weight 0 is not computed."""

    may_change: ClassVar[MayChange] = MayChange.ON_CHECKPOINT_COPY

    umr_weight: float = Field(1.0, ge=0)
    """Uni-modal reconstruction, s1 to s1 and s2 to s2."""
    cmr_weight: float = Field(1.0, ge=0)
    """Cross-modal reconstruction, s1 to s2 and s2 to s1."""
    mim_weight: float = Field(1.0, ge=0)
    """Mutual-information maximization: NT-Xent between the sensors' features."""
    mde_weight: float = Field(0.0, ge=0)
    """Modality-discrepancy elimination: the features' cosine similarity."""
    s1_weight: float = Field(1.0, ge=0)
    """Factor on the terms that reconstruct S1 (s1 to s1 and s2 to s1), in addition to the weights above."""
    temperature: float = Field(0.5, gt=0)
    """Temperature of NT-Xent."""
    norm_pix: bool = False
    """Reconstruct patches normalized by their own mean and variance."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.umr_weight or self.cmr_weight or self.mim_weight or self.mde_weight):
            raise ConfigError("at least one of loss.umr_weight, cmr_weight, mim_weight, mde_weight must be positive")
        one_target = self.s1_weight == 0 and not (self.umr_weight and self.cmr_weight)
        if one_target and not (self.mim_weight or self.mde_weight):
            idle = "S1" if self.umr_weight else "S2"
            raise ConfigError(
                f"loss.s1_weight 0 leaves the {idle} encoder without a loss: set both loss.umr_weight and loss.cmr_weight, or loss.mim_weight"
            )
        return self

    @property
    def parts(self) -> tuple[bool, tuple[str, ...]]:
        """What the weights decide about the network: whether it has a norm for contrastive terms, and the decoders' targets."""
        return self.contrastive, self.targets

    @property
    def contrastive(self) -> bool:
        """Whether a loss reads the pooled features."""
        return bool(self.mim_weight or self.mde_weight)

    @property
    def targets(self) -> tuple[str, ...]:
        """Sensors whose images are reconstructed."""
        if not (self.umr_weight or self.cmr_weight):
            return ()
        return sensors.SENSORS if self.s1_weight else ("s2",)

    def weight(self, source: str, target: str) -> float:
        """Weight of the term that reconstructs the target sensor's images from the source sensor's."""
        weight = self.umr_weight if source == target else self.cmr_weight
        return weight * (self.s1_weight if target == "s1" else 1.0)


class Optim(Section):
    """AdamW with a linear warm-up and a decay to zero, per step."""

    may_change: ClassVar[MayChange] = MayChange.ON_CHECKPOINT_COPY

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; not applied to biases, norms and tokens."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments, each in [0, 1)."""
    batch_size: Annotated[int, MayChange.NEVER] = Field(128, ge=1)
    """Pairs per step over all workers; a multiple of the number of workers."""
    micro_batch_size: Annotated[int | None, MayChange.ON_STUDY_RESUME] = Field(None, ge=1)
    """Pairs in one pass through the network on each worker; null is the worker's whole part of the batch. Only memory and
    time depend on it: gradients add up to those of the whole batch, and NT-Xent contrasts all of it."""
    warmup_epochs: int = Field(10, ge=0)
    """Epochs of linear warm-up from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine decays at once, which is published; constant stays at ``optim.lr`` until the
    cooldown, so that a training can become longer before its cooldown and equal one that was long from the start."""
    cooldown_ratio: float = Field(0.2, ge=0, lt=1)
    """Schedule constant: share of the training's epochs, rounded and at least one, in which the learning rate falls to zero
    with one minus the square root of their progress (arXiv 2405.18392); 0 is no cooldown."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas must lie in [0, 1): found {list(self.betas)}")
        return self

    def epochs_before_decay(self, num_epochs: int) -> int:
        """Epochs before the learning rate decays, in a training of ``num_epochs``; a longer training begins with the same."""
        if self.schedule == "cosine":
            return self.warmup_epochs
        return num_epochs - (max(1, round(self.cooldown_ratio * num_epochs)) if self.cooldown_ratio else 0)


class Train(Section):
    """Length, precision and seed of the training."""

    epochs: Annotated[int, MayChange.IF_LARGER] = Field(150, ge=1)
    """Passes over the training split."""
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], MayChange.ON_STUDY_RESUME] = "auto"
    """Autocast type; auto is bf16 on a GPU that supports it, fp16 on an older one, fp32 on a CPU."""
    compile: Annotated[bool, MayChange.ON_STUDY_RESUME] = False
    """Compile the transformer blocks with ``torch.compile``; each trial starts tens of seconds later. Needs a C++ compiler."""
    seed: int = Field(0, ge=0)
    """Seed of weights, order, flips and masks."""
    checkpoint_every: Annotated[int, MayChange.ON_STUDY_RESUME] = Field(1, ge=1)
    """Epochs between checkpoints; the last epoch always saves one."""
    changes: tuple[dict[str, Any], ...] = ()
    """Values that change during the training, such as ``[{after_epoch: 4, masking.ratio: 0.6}]``: they hold from the next epoch
    on. Fields that copies may change can change here; a loss weight must stay 0 or stay positive."""


class Eval(Section):
    """The retrieval score of an epoch, within the validation split."""

    every: Annotated[int, MayChange.ON_TRAINING_RESUME] = Field(1, ge=1)
    """Epochs between scores; the last epoch is always scored."""
    k: Annotated[int, MayChange.ON_TRAINING_RESUME] = Field(10, ge=1)
    """Retrieved scenes per query."""
    batch_size: Annotated[int, MayChange.ON_STUDY_RESUME] = Field(256, ge=1)
    """Pairs per batch when embedding."""
    max_pairs: Annotated[int | None, MayChange.ON_TRAINING_RESUME] = Field(4096, ge=4)
    """Validation pairs to use, drawn once with a fixed seed; null means all."""


class Config(Section):
    """One training run."""

    data: Data = Data()
    model: Model = Model()
    masking: Masking = Masking()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _check(self) -> Self:
        patches = self.model.num_patches
        kept = int(patches * (1 - self.masking.ratio))
        if not 1 <= kept < patches:
            raise ConfigError(
                f"masking.ratio must leave some patches visible and some hidden: {self.masking.ratio} keeps {kept} of {patches}"
            )
        if self.optim.warmup_epochs >= self.train.epochs and self.optim.warmup_epochs > 0:
            raise ConfigError(
                f"optim.warmup_epochs must be smaller than train.epochs: found {self.optim.warmup_epochs} of {self.train.epochs}"
            )
        constant = self.optim.epochs_before_decay(self.train.epochs)
        if self.optim.warmup_epochs > constant:
            raise ConfigError(
                f"optim.warmup_epochs and the cooldown must fit into train.epochs: found {self.optim.warmup_epochs} and "
                f"{self.train.epochs - constant} of {self.train.epochs}"
            )
        return self
