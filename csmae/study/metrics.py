"""The metrics that an epoch of a training reports, by the names that objectives and constraints use."""

from __future__ import annotations

from csmae.sensors import DIRECTIONS

LABEL_SCORES = (
    "val/f1_mean",
    *(
        f"val/{score}/{direction}"
        for score in ("f1", "mean_pair_f1", "precision", "recall")
        for direction in DIRECTIONS
    ),
)
"""Scores that compare the labels of scenes."""

SCORES = (*LABEL_SCORES, "val/recall_at_1", "val/mrr")
"""How good an epoch's encoder is; only every ``eval.every`` epochs."""

TERMS = {
    "train/umr_s1": ("loss.umr_weight", "loss.s1_weight"),
    "train/umr_s2": ("loss.umr_weight",),
    "train/cmr_s2_to_s1": ("loss.cmr_weight", "loss.s1_weight"),
    "train/cmr_s1_to_s2": ("loss.cmr_weight",),
    "train/mim": ("loss.mim_weight",),
    "train/mde": ("loss.mde_weight",),
}
"""Loss terms, and the weights that must not be 0 for a configuration to compute them."""

WITH_SCORES = "time/eval_s"

MEASURED = (
    *("train/loss", *TERMS, "train/lr", "train/micro_batch", "train/pairs_per_s"),
    *("time/epoch_s", WITH_SCORES, "time/worker_s", "time/gpu_s"),
)
"""What else an epoch measures; ``time/gpu_s`` with GPUs only."""

COSTS = ("cost/params", "cost/flops", "cost/activation_bytes")
"""Metrics of a configuration that are known before it is trained."""

METRICS = (*SCORES, *MEASURED, *COSTS)


def due(name: str, scored: bool) -> bool:
    """Whether every configuration reports a metric in an epoch, which has scores or has none."""
    return name not in TERMS and (scored or (name not in SCORES and name != WITH_SCORES))
