"""Private names of Optuna are used in one file, which says why."""

import ast
from collections.abc import Iterator

from tests.test_layers import imports, modules

ALLOWED = "csmae.trials.optuna_private"


def private_attributes(tree: ast.Module) -> Iterator[str]:
    """Attributes with a leading underscore of other objects than ``self`` and ``cls``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if owner not in ("self", "cls"):
                yield node.attr


def test_only_one_file_uses_private_names_of_optuna() -> None:
    found = {
        name: attributes
        for name, tree in modules()
        if any(library.split(".")[0] == "optuna" for library in imports(tree))
        and (attributes := set(private_attributes(tree)))
    }
    assert set(found) == {ALLOWED}, found
    imported = {module for module, tree in modules() for name in imports(tree) if name.startswith("optuna._")}
    assert imported <= {ALLOWED}
