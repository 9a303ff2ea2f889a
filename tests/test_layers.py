"""The house: imports point downwards, and each heavy dependency has one owner."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [
    {
        "csmae.sensors",
        "csmae.config",
        "csmae.cpus",
        "csmae.settings",
        "csmae.lock",
        "csmae.out_of_memory",
        "csmae.scratch",
        "csmae.sqlite",
        "csmae.terminal",
    },
    {"csmae.model"},
    {"csmae.data"},
    {"csmae.encoders", "csmae.nearest"},
    {"csmae.retrieval"},
    {"csmae.training"},
    {"csmae.tuning"},
    {"csmae.tracking"},
    {"csmae.retrieving"},
    {"csmae", "csmae.__main__", "search", "train_worker"},
]
"""From the ground up. A room imports from its own floor and those below; the strangers excepted."""

STRANGERS = [{"csmae.model", "csmae.data"}, {"csmae.tuning", "csmae.tracking"}]

OWNERS = {
    "ray": {"search", "csmae.tuning"},
    "optuna": {"csmae.tuning"},
    "mlflow": {"csmae.tracking"},
    "matplotlib": {"csmae.tracking"},
    "lmdb": {"csmae.data"},
    "timm": {"csmae.model"},
    "wandb": {"csmae.tracking"},
    "rasterio": {"csmae.retrieving"},
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


def room(module: str) -> str | None:
    rooms = [name for floor in FLOORS for name in floor if module == name or module.startswith(f"{name}.")]
    return max(rooms, key=len, default=None)


def floor(name: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


def test_imports_point_downwards() -> None:
    wrong = []
    for module, tree in modules():
        here = room(module)
        assert here is not None, f"{module} stands on no floor"
        for name in imports(tree):
            there = room(name) if name.split(".")[0] in ("csmae", "search", "train_worker") else None
            if there is None or there == here or (there == "csmae" and name != "csmae.load_encoder"):
                continue
            if floor(there) > floor(here) or any({here, there} == pair for pair in STRANGERS):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_each_heavy_dependency_has_one_owner() -> None:
    wrong = []
    for module, tree in modules():
        for name in imports(tree):
            package = name.split(".")[0]
            if package in OWNERS and room(module) not in OWNERS[package]:
                wrong.append(f"{module} imports {package}")
    assert not wrong


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in modules() if not ast.get_docstring(tree)] == []
