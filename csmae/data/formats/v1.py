"""Decodes the values of BigEarthNet v1: pickled patch objects, of which only the offsets of the pixels are needed.

Nearly all values of an archive differ only in their pixels. The bytes around the pixels of a decoded value (its skeleton)
therefore tell by comparison where the bands of the next value are. The bytes after the pixels, the names of classes, vary,
but must not create an object.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from csmae.data.errors import BandTypeError, DamagedValueError
from csmae.data.formats.layout import STORED_60M_BANDS, STORED_BANDS, Segments, plan_copies
from csmae.data.formats.unpickle import ByteRange, InertObject, Unpickled, is_plain_data, unpickle
from csmae.sensors import BANDS, CLASSES, S2_60M_BANDS

_MAX_SKELETONS = 64
"""Cached skeletons; each process that writes an archive produces a few."""


class _Skeleton(NamedTuple):
    """The bytes that values of one kind share, and where their bands are."""

    pieces: tuple[tuple[int, int, bytes], ...]
    """Start, end and content of the shared bytes."""
    end: int
    """First byte after the last pixels."""
    segments: Segments

    def matches(self, value: memoryview) -> bool:
        same = all(value[start:end] == content for start, end, content in self.pieces)
        return same and is_plain_data(value, self.end)


class PickleDecoder:
    """Locates bands in v1 values.

    Args:
        bands: Bands that a value must hold; it may hold others.
    """

    def __init__(self, bands: tuple[str, ...]) -> None:
        self._bands = bands
        self._skeletons: list[_Skeleton] = []

    def __call__(self, value: memoryview) -> Segments:
        """Return where the bands are.

        Raises:
            DamagedValueError: The value is not a v1 pickle, or a band is missing or invalid.
        """
        for position, skeleton in enumerate(self._skeletons):
            if skeleton.matches(value):
                if position:
                    self._skeletons.insert(0, self._skeletons.pop(position))
                return skeleton.segments
        unpickled = unpickle(value)
        segments = plan_copies(_band_offsets(unpickled, self._bands))
        self._skeletons.insert(0, _skeleton(value, unpickled, segments))
        del self._skeletons[_MAX_SKELETONS:]
        return segments


def _skeleton(value: memoryview, unpickled: Unpickled, segments: Segments) -> _Skeleton:
    """Return what a value must share with this one to have the same segments."""
    pieces, start = [], 0
    for content_start, content_end in unpickled.content_ranges:
        pieces.append((start, content_start, bytes(value[start:content_start])))
        start = content_end
    # Protocol 5 creates the last array after its pixels; that must be shared, too.
    end = max(start, unpickled.objects_end)
    pieces.append((start, end, bytes(value[start:end])))
    return _Skeleton(tuple(pieces), end, segments)


def _band_offsets(unpickled: Unpickled, bands: tuple[str, ...]) -> dict[str, int]:
    """Return the first byte of each band's pixels.

    Raises:
        DamagedValueError: A band is missing, duplicated, or of the wrong type, shape or length.
    """
    found: dict[str, InertObject] = {}
    for band in unpickled.bands:
        name = band.attributes.get("name")
        if not isinstance(name, str) or name in found:
            raise DamagedValueError("the pickle holds an unnamed band or two bands of one name")
        found[name] = band
    missing = [name for name in bands if name not in found]
    if missing:
        raise DamagedValueError(f"band {missing[0]} is missing (found {', '.join(found)[:100] or 'none'})")
    return {name: _offset(name, found[name].attributes.get("data")) for name in bands}


def _offset(name: str, array: Any) -> int:
    """Return the first byte of an array's content, after checking all that the band requires."""
    band = (STORED_BANDS | STORED_60M_BANDS)[name]
    shape, dtype, order, content = _array(name, array)
    if not (_is_flat(shape) and shape == (band.size, band.size)):
        found = list(shape[:4]) if _is_flat(shape) else "none"
        raise DamagedValueError(f"band {name} must have shape {[band.size, band.size]}: found {found}")
    if _dtype_name(dtype) != band.dtype or order != "row-major":
        found = _dtype_name(dtype) + (f" in {order} order" if order != "row-major" else "")
        raise BandTypeError(f"band {name} must be {band.dtype} in row-major order: found {found}")
    if content.size != band.num_bytes:
        raise DamagedValueError(f"band {name} needs {band.num_bytes} bytes: found {content.size}")
    start: int = content.start
    return start


def _array(name: str, array: Any) -> tuple[Any, Any, str, ByteRange]:
    """Return shape, type, order and content of an array as numpy pickles it in protocols 2 to 4, and in protocol 5."""
    function = array.name if isinstance(array, InertObject) else None
    if function == "_reconstruct" and isinstance(array.state, tuple) and len(array.state) == 5:
        _, shape, dtype, is_column_major, content = array.state
        if isinstance(content, ByteRange):
            return shape, dtype, _order(is_column_major, False, True), content
    if function == "_frombuffer" and array.state is None and len(array.args) == 4:
        content, dtype, shape, order = array.args
        if isinstance(content, ByteRange):
            return shape, dtype, _order(order, "C", "F"), content
    raise DamagedValueError(f"band {name} is not an array")


def _order(found: Any, row_major: str | bool, column_major: str | bool) -> str:
    """Name the order that a pickle declares; numpy does not write 0 and 1 in place of booleans."""
    if type(found) is not type(row_major):
        return "unknown"
    return "row-major" if found == row_major else "column-major" if found == column_major else "unknown"


def _is_flat(shape: Any) -> bool:
    """Whether it is a tuple of integers; printing or comparing forged nested tuples can take forever."""
    return isinstance(shape, tuple) and all(type(size) is int for size in shape)


def _dtype_name(dtype: Any) -> str:
    """Return numpy's name such as ``<f4``; a question mark if it is not a dtype."""
    if not (isinstance(dtype, InertObject) and dtype.name == "dtype" and isinstance(dtype.state, tuple)):
        return "?"
    parts = (*dtype.state[1:2], *dtype.args[:1])
    return "".join(part for part in parts if isinstance(part, str))[:8]


def offsets_60m(value: memoryview) -> dict[str, int]:
    """Return the first byte of each 60 m band that a value holds.

    Raises:
        DamagedValueError: The value is not a v1 pickle, or such a band is invalid.
    """
    unpickled = unpickle(value)
    names = [band.attributes.get("name") for band in unpickled.bands]
    return _band_offsets(unpickled, tuple(name for name in S2_60M_BANDS if name in names))


def stored_sensors(value: memoryview) -> set[str]:
    """Return the sensors whose bands a value holds.

    Raises:
        DamagedValueError: The value is not a v1 pickle.
    """
    names = [band.attributes.get("name") for band in unpickle(value).bands]
    return {sensor for sensor, bands in BANDS.items() if any(name in bands for name in names)}


def class_names(value: memoryview) -> list[str]:
    """Return a patch's classes among the 19; empty if the value has no labels.

    Raises:
        DamagedValueError: The value is not a v1 pickle, or its labels are not classes.
    """
    root = unpickle(value).root
    names = root.attributes.get("new_labels") if isinstance(root, InertObject) else None
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DamagedValueError("new_labels must be a list of class names")
    foreign = [name for name in names if name not in CLASSES]
    if foreign:
        raise DamagedValueError(f"new_labels must be names of the 19 classes: found {foreign[0][:80]!r}")
    return names
