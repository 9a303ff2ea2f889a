"""The values of BigEarthNet v1: pickled patch objects, of which only the places of the bands' pixels are wanted.

Nearly all values of an archive are alike up to their last pixel: the same opcodes, only the pixels differ. So the bytes
around the pixels (the skeleton) of a value that was read tell where the bands of the next lie, by comparison alone; what
follows, the names of classes, must not name anything that could be called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from csmae.data.formats.layout import STORED_60M_BANDS, STORED_BANDS, BandTypeError, DamagedValueError, Layout, plan
from csmae.data.formats.unpickle import Bytes, Thing, Unpickled, names_nothing, unpickle
from csmae.sensors import BANDS, CLASSES, S2_60M_BANDS

_MAX_KNOWN = 64
"""Different skeletons that are remembered; each writing process makes a few."""


class _Skeleton(NamedTuple):
    pieces: tuple[tuple[int, int, bytes], ...]
    """Start, end and content of the bytes that are the same in each value of this kind."""
    end: int
    """First byte after the last pixels."""
    layout: Layout

    def fits(self, value: memoryview) -> bool:
        alike = all(value[start:end] == content for start, end, content in self.pieces)
        return alike and names_nothing(value, self.end)


class PickleDecoder:
    """Finds bands in v1 values.

    Args:
        bands: Names of the bands that a value must hold; others may be there.
    """

    def __init__(self, bands: tuple[str, ...]) -> None:
        self._bands = bands
        self._known: list[_Skeleton] = []

    def __call__(self, value: memoryview) -> Layout:
        """Where the bands lie.

        Raises:
            DamagedValueError: The value is no v1 pickle, or a band is missing or not what it must be.
        """
        for position, skeleton in enumerate(self._known):
            if skeleton.fits(value):
                if position:
                    self._known.insert(0, self._known.pop(position))
                return skeleton.layout
        unpickled = unpickle(value)
        layout = plan(band_offsets(unpickled, self._bands))
        self._known.insert(0, _skeleton(value, unpickled, layout))
        del self._known[_MAX_KNOWN:]
        return layout


def _skeleton(value: memoryview, unpickled: Unpickled, layout: Layout) -> _Skeleton:
    """What a value must share with this one for the layout to hold for it too."""
    pieces, start = [], 0
    for begin, end in unpickled.variable:
        pieces.append((start, begin, bytes(value[start:begin])))
        start = end
    # Under protocol 5 the last array is made after its pixels: that too must be the same.
    end = max(start, unpickled.made)
    pieces.append((start, end, bytes(value[start:end])))
    return _Skeleton(tuple(pieces), end, layout)


def band_offsets(unpickled: Unpickled, bands: tuple[str, ...]) -> dict[str, int]:
    """First byte of each wanted band's pixels.

    Raises:
        DamagedValueError: A band is missing, there twice, or of the wrong type, shape or length.
    """
    found: dict[str, Thing] = {}
    for thing in unpickled.bands:
        name = thing.attributes.get("name")
        if not isinstance(name, str) or name in found:
            raise DamagedValueError("the pickle holds a band without a name or two of one name")
        found[name] = thing
    missing = [name for name in bands if name not in found]
    if missing:
        raise DamagedValueError(f"band {missing[0]} is missing (there are {', '.join(found)[:100] or 'none'})")
    return {name: _offset(name, found[name].attributes.get("data")) for name in bands}


def _offset(name: str, array: Any) -> int:
    """First byte of an array's content, checked against the band's whole contract."""
    band = (STORED_BANDS | STORED_60M_BANDS)[name]
    shape, dtype, order, content = _array(name, array)
    if not (_is_flat(shape) and shape == (band.size, band.size)):
        found = list(shape[:4]) if _is_flat(shape) else "none"
        raise DamagedValueError(f"band {name} must have shape {[band.size, band.size]}: found {found}")
    if _dtype_name(dtype) != band.dtype or order != "row":
        found = _dtype_name(dtype) + (f" in {order} order" if order != "row" else "")
        raise BandTypeError(f"band {name} must be {band.dtype} in row order: found {found}")
    if content.size != band.num_bytes:
        raise DamagedValueError(f"band {name} needs {band.num_bytes} bytes: found {content.size}")
    start: int = content.start
    return start


def _array(name: str, array: Any) -> tuple[Any, Any, str, Bytes]:
    """Shape, type, order and content of an array, as numpy pickles it under protocols 2 to 4, and 5."""
    kind = array.kind if isinstance(array, Thing) else None
    if kind == "_reconstruct" and isinstance(array.state, tuple) and len(array.state) == 5:
        _, shape, dtype, by_column, content = array.state
        if isinstance(content, Bytes):
            return shape, dtype, _order(by_column, False, True), content
    if kind == "_frombuffer" and array.state is None and len(array.args) == 4:
        content, dtype, shape, order = array.args
        if isinstance(content, Bytes):
            return shape, dtype, _order(order, "C", "F"), content
    raise DamagedValueError(f"band {name} holds no array")


def _order(found: Any, row: str | bool, column: str | bool) -> str:
    """What a pickle says of an array's order; 0 and 1 are not what numpy writes."""
    if type(found) is not type(row):
        return "unknown"
    return "row" if found == row else "column" if found == column else "unknown"


def offsets_60m(value: memoryview) -> dict[str, int]:
    """First byte of the 60 m bands that a value holds.

    Raises:
        DamagedValueError: The value is no v1 pickle, or such a band is not what it must be.
    """
    unpickled = unpickle(value)
    names = [thing.attributes.get("name") for thing in unpickled.bands]
    return band_offsets(unpickled, tuple(name for name in S2_60M_BANDS if name in names))


def sensors(value: memoryview) -> set[str]:
    """Those of which a value holds bands.

    Raises:
        DamagedValueError: The value is no v1 pickle.
    """
    names = [thing.attributes.get("name") for thing in unpickle(value).bands]
    return {sensor for sensor, bands in BANDS.items() if any(name in bands for name in names)}


def _is_flat(shape: Any) -> bool:
    """Whether it is a tuple of integers; printing or comparing nested tuples of a forger can take for ever."""
    return isinstance(shape, tuple) and all(type(size) is int for size in shape)


def _dtype_name(dtype: Any) -> str:
    """numpy's name such as ``<f4``; a question mark where it cannot be told."""
    if not (isinstance(dtype, Thing) and dtype.kind == "dtype" and isinstance(dtype.state, tuple)):
        return "?"
    parts = (*dtype.state[1:2], *dtype.args[:1])
    return "".join(part for part in parts if isinstance(part, str))[:8]


def labels(value: memoryview) -> list[str]:
    """Names of a patch's classes among the 19; none where the value names none.

    Raises:
        DamagedValueError: The value is no v1 pickle, or names something else.
    """
    root = unpickle(value).root
    names = root.attributes.get("new_labels") if isinstance(root, Thing) else None
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DamagedValueError("new_labels must be a list of class names")
    foreign = [name for name in names if name not in CLASSES]
    if foreign:
        raise DamagedValueError(f"new_labels must be names of the 19 classes: found {foreign[0][:80]!r}")
    return names
