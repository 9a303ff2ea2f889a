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
"""Scores of an epoch's encoder, every ``eval.every`` epochs."""

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
"""Other metrics of an epoch; ``time/gpu_s`` only with GPUs."""

COSTS = ("cost/params", "cost/flops", "cost/activation_bytes")
"""Metrics of a configuration that are known before it is trained."""

METRICS = (*SCORES, *MEASURED, *COSTS)


DESCRIPTIONS = {
    "val/f1_mean": ("Mean of val/f1 over the four directions.", "0 to 1"),
    "val/f1/DIRECTION": ("Harmonic mean of mean precision and mean recall, as in arXiv 2401.07782.", "0 to 1"),
    "val/mean_pair_f1/DIRECTION": ("Mean of the F1 of each pair of query and retrieved scene.", "0 to 1"),
    "val/precision/DIRECTION": ("Mean share of a retrieved scene's classes that the query has, too.", "0 to 1"),
    "val/recall/DIRECTION": ("Mean share of the query's classes that a retrieved scene has, too.", "0 to 1"),
    "val/recall_at_1": (
        "Share of scenes whose image from the other sensor ranks first, mean of s1_to_s2 and s2_to_s1. Needs no labels.",
        "0 to 1",
    ),
    "val/mrr": (
        "Mean reciprocal rank of a scene's image from the other sensor, mean of s1_to_s2 and s2_to_s1. Needs no labels.",
        "0 to 1",
    ),
    "train/loss": ("Weighted sum of the loss terms, mean of the epoch.", ""),
    "train/umr_s1": ("Loss of reconstructing S1 from S1.", ""),
    "train/umr_s2": ("Loss of reconstructing S2 from S2.", ""),
    "train/cmr_s2_to_s1": ("Loss of reconstructing S1 from S2.", ""),
    "train/cmr_s1_to_s2": ("Loss of reconstructing S2 from S1.", ""),
    "train/mim": ("Loss of mutual-information maximization: NT-Xent between the sensors' features.", ""),
    "train/mde": ("Loss of modality-discrepancy elimination.", ""),
    "train/lr": ("Learning rate at the end of the epoch.", ""),
    "train/micro_batch": ("Pairs that a worker computes at a time.", "pairs"),
    "train/pairs_per_s": ("Training speed of all workers together, without scoring.", "pairs/s"),
    "time/epoch_s": ("Duration of the epoch's training, without scoring.", "s"),
    "time/eval_s": ("Duration of the epoch's scoring.", "s"),
    "time/worker_s": ("Time of the epoch, summed over the workers.", "s"),
    "time/gpu_s": ("Time of the epoch, summed over the GPUs; only with GPUs.", "s"),
    "cost/params": ("Parameters of encoder and decoders.", ""),
    "cost/flops": ("Floating-point operations of a training step for one pair, forward and backward.", "FLOPs"),
    "cost/activation_bytes": (
        "Estimate of the activations that the forward pass keeps for one pair in float32.",
        "bytes",
    ),
}
"""What each metric is, and its unit or range."""


def is_always_reported(name: str, scored: bool) -> bool:
    """Whether every configuration reports a metric in an epoch that is ``scored`` or not."""
    return name not in TERMS and (scored or (name not in SCORES and name != WITH_SCORES))
