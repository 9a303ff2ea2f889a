"""The layout: imports point downwards, and each heavy dependency has its owners."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LAYERS = [
    {
        "csmae.sensors",
        "csmae.atomic",
        "csmae.config",
        "csmae.changes",
        "csmae.blas",
        "csmae.cpus",
        "csmae.settings",
        "csmae.lock",
        "csmae.distributed",
        "csmae.out_of_memory",
        "csmae.scratch",
        "csmae.sqlite",
        "csmae.trial_status",
        "csmae.engine_logs",
    },
    {"csmae.storage", "csmae.model", "csmae.data", "csmae.tracking"},
    {"csmae.study", "csmae.encoders"},
    {"csmae.trials", "csmae.retrieval"},
    {"csmae.training", "csmae.cluster"},
    {"csmae.workers"},
    {"csmae.tuning"},
    {"csmae.console", "csmae.reporting"},
    {"csmae", "csmae.cli", "csmae.__main__", "search", "train_worker"},
]
"""From the bottom up. A package imports from those below it, never from its own layer."""

OWNERS = {
    "ray": {"csmae.cli", "csmae.tuning", "csmae.workers", "csmae.cluster"},
    "optuna": {"csmae.study", "csmae.trials", "csmae.tuning", "csmae.console", "csmae.reporting", "csmae.engine_logs"},
    "mlflow": {"csmae.tracking"},
    "matplotlib": {"csmae.reporting"},
    "lmdb": {"csmae.data"},
    "timm": {"csmae.model"},
    "wandb": {"csmae.tracking"},
    "rasterio": {"csmae.retrieval"},
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in [*ROOT.glob("*.py"), *(ROOT / "csmae").rglob("*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(module: str) -> str | None:
    packages = [name for layer in LAYERS for name in layer if module == name or module.startswith(f"{name}.")]
    return max(packages, key=len, default=None)


def layer(name: str) -> int:
    return next(level for level, packages in enumerate(LAYERS) if name in packages)


def test_imports_point_downwards() -> None:
    wrong = []
    for module, tree in modules():
        here = package(module)
        assert here is not None, f"{module} is in no layer"
        for name in imports(tree):
            there = package(name) if name.split(".")[0] in ("csmae", "search", "train_worker") else None
            base_or_top = there is not None and layer(there) == layer(here) in (0, len(LAYERS) - 1)
            if there is None or there == here or base_or_top or name == "csmae":
                continue
            if layer(there) >= layer(here):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_each_heavy_dependency_has_one_owner() -> None:
    wrong = []
    for module, tree in modules():
        for name in imports(tree):
            library = name.split(".")[0]
            if library in OWNERS and package(module) not in OWNERS[library]:
                wrong.append(f"{module} imports {package}")
    assert not wrong


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in modules() if not ast.get_docstring(tree)] == []
