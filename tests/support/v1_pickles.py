"""Writes the pickled patch objects of BigEarthNet v1 as each generation of its encoder wrote them.

Their classes exist under the names in the pickles only while a pickle is written or, for comparison, read by Python's
``pickle``.
"""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pydantic
import pydantic.v1
from numpy.typing import NDArray

Bands = Mapping[str, NDArray[Any]]

STYLES = ("plain", "pydantic 1", "pydantic 2")
"""Generations: plain classes, and models of pydantic 1 and 2."""

_PACKAGE = "bigearthnet_patch_interface"


class _Plain:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class _Pydantic1(pydantic.v1.BaseModel):
    name: str
    spatial_resolution: int
    data_shape: tuple[int, int]
    data: np.ndarray

    class Config:
        arbitrary_types_allowed = True


class _Pydantic2(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    name: str
    spatial_resolution: int
    data_shape: tuple[int, int]
    data: np.ndarray


_BASES: dict[str, type] = {"plain": _Plain, "pydantic 1": _Pydantic1, "pydantic 2": _Pydantic2}


@contextmanager
def patch_interface(style: str) -> Iterator[dict[str, type]]:
    """Make the package of the pickles' classes importable, with band classes of one generation."""
    bands = ("BenS1_Band", "BenS2_10mBand", "BenS2_20mBand", "BenS2_60mBand")
    members_of: dict[str, dict[str, type]] = {
        "band_interface": dict.fromkeys(bands, _BASES[style]),
        "merged_interface": {"BigEarthNet_S1_S2_Patch": _Plain},
        "s1_interface": {"BigEarthNet_S1_Patch": _Plain},
        "s2_interface": {"BigEarthNet_S2_Patch": _Plain},
    }
    package, classes = types.ModuleType(_PACKAGE), {}
    modules = {_PACKAGE: package}
    for submodule, members in members_of.items():
        module = modules[f"{_PACKAGE}.{submodule}"] = types.ModuleType(f"{_PACKAGE}.{submodule}")
        for name, parent in members.items():
            # A subclass must not evaluate its model's annotations in a module without their names.
            classes[name] = type(name, (parent,), {"__module__": module.__name__, "__qualname__": name})
            setattr(module, name, classes[name])
    sys.modules.update(modules)
    try:
        yield classes
    finally:
        for name in modules:
            del sys.modules[name]


def pickled(bands: Bands, labels: list[str], style: str = "pydantic 2", protocol: int = 4, **changes: Any) -> bytes:
    """Pickle a patch.

    Args:
        bands: Bands by name; if a sensor has none, the patch is of the other sensor only.
        labels: Names of classes among the 19.
        style: One of ``STYLES``.
        protocol: Protocol of the pickle.
        changes: Attributes of the patch to add or replace.
    """
    with patch_interface(style) as classes:
        created = {name: _band(classes, name, data) for name, data in bands.items()}
        s1 = {f"band{name}": band for name, band in created.items() if name[0] == "V"}
        s2 = {f"band{name[1:]}": band for name, band in created.items() if name[0] == "B"}
        bands_field = "bands" if style == "plain" else "_bands"
        patches = {
            f"s{number}_patch": classes[f"BigEarthNet_S{number}_Patch"](
                **members, **{bands_field: list(members.values())}
            )
            for number, members in ((1, s1), (2, s2))
            if members
        }
        attributes: dict[str, Any] = {"labels": ["some class of the 43"], "new_labels": labels} | changes
        patch = classes["BigEarthNet_S1_S2_Patch"](**patches, **attributes) if len(patches) == 2 else None
        if patch is None:
            patch = next(iter(patches.values()))
            patch.__dict__.update(attributes)
        return pickle.dumps(patch, protocol=protocol)


def _band(classes: dict[str, type], name: str, data: NDArray[Any]) -> Any:
    kind = (
        "BenS1_Band" if name[0] == "V" else {120: "BenS2_10mBand", 60: "BenS2_20mBand"}.get(len(data), "BenS2_60mBand")
    )
    return classes[kind](name=name, spatial_resolution=1200 // len(data), data_shape=data.shape, data=data)


def write_v1(folder: Path, patches: Mapping[str, bytes], splits: Mapping[str, list[str]]) -> None:
    """Write a v1 archive: pickles by name, and lists of names with the line endings of the published lists."""
    lmdb_dir = folder / "BigEarthNetEncoded.lmdb"
    lmdb_dir.mkdir(parents=True)
    capacity = 2 * sum(len(value) + 8192 for value in patches.values()) + (1 << 20)
    with lmdb.open(str(lmdb_dir), map_size=capacity) as environment, environment.begin(write=True) as transaction:
        for name, value in patches.items():
            transaction.put(name.encode(), value)
    for file, names in splits.items():
        (folder / file).write_bytes("".join(f"{name}\r\n" for name in names).encode())
