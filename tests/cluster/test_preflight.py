"""Preflight checks of reports from the nodes."""

import pytest

from csmae.cluster.node_report import ClusterReport, Node, NodeReport
from csmae.cluster.preflight import advisory_checks, required_checks

REPORT = NodeReport({"python": "3.11.7"}, "0600", (), None, {"/": (2**40, 0.1)}, None, "two pairs", None, 0.0)


def with_node(name: str, node: NodeReport | None, ray_gpus: int = 0, clock_offset_s: float = 0.0) -> ClusterReport:
    return ClusterReport(REPORT, [Node("a", 0, REPORT, ""), Node(name, ray_gpus, node, "", clock_offset_s)])


def changed(**values: object) -> NodeReport:
    return NodeReport(**vars(REPORT) | values)


@pytest.mark.parametrize(
    ("cluster", "name", "text"),
    [
        (with_node("b", REPORT, clock_offset_s=9.2), "clocks", "b: 9 s ahead"),
        (with_node("b", REPORT, clock_offset_s=-61), "clocks", "b: 61 s behind"),
        (
            with_node("b", changed(gpus=("NVIDIA H100 driver 580",))),
            "GPUs",
            "b: Ray counts 0, nvidia-smi lists 1",
        ),
        (with_node("b", REPORT, 1), "GPUs", "b: Ray counts 1, nvidia-smi lists 0"),
        (
            with_node("b", changed(gpus=("NVIDIA T4 driver 9",), cuda_error="too old"), 1),
            "GPUs",
            "b: torch cannot use them: too old",
        ),
        (with_node("b", changed(disks={"/data": (2**30, 0.5)})), "disks", "b: /data has 1.0 GiB free, 50% used"),
        (with_node("b", changed(disks={"/": (2**40, 0.96)})), "disks", "b: / has 1024.0 GiB free, 96% used"),
        (with_node("b", changed(token_mode="none")), "token", "b: has none"),
        (with_node("b", changed(versions={"python": "3.12.1"})), "versions", "b: python 3.12.1, here 3.11.7"),
        (with_node("b", changed(data="three pairs")), "data", "b: three pairs; here two pairs"),
    ],
)
def test_an_error_names_only_its_node(cluster: ClusterReport, name: str, text: str) -> None:
    failed = [it for it in (*required_checks(cluster), *advisory_checks(cluster)) if it.remedy]
    assert [(it.name, it.found) for it in failed] == [(name, text)]
