"""The values of BigEarthNet v2: safetensors, parsed here because an archive is not to be trusted.

A value is 8 bytes of header length n, n bytes of JSON (``{"B02": {"dtype", "shape", "data_offsets"}, …}``), then the
pixels. Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import json
from typing import Any

from csmae.data.formats.layout import STORED_60M_BANDS, STORED_BANDS, BandTypeError, DamagedValueError, Layout, plan
from csmae.sensors import S2_60M_BANDS

MAX_HEADER = 64 * 1024
"""Bytes; a real header has 136 or 824."""

_MAX_KNOWN = 256
"""Different headers that are remembered; an archive by one writer has two."""

_DTYPES = {"<f4": "F32", "<u2": "U16"}


class SafetensorsDecoder:
    """Finds bands in safetensors values; a header that was seen before is not parsed again.

    Args:
        bands: Names of the bands that a value must hold; others may be there.
    """

    def __init__(self, bands: tuple[str, ...]) -> None:
        self._bands = bands
        self._known: dict[tuple[int, bytes], Layout] = {}

    def __call__(self, value: memoryview) -> Layout:
        """Where the bands lie.

        Raises:
            DamagedValueError: The value is not safetensors, or a band is missing or not what it must be.
        """
        header = header_of(value)
        seen = (len(value), header)
        layout = self._known.get(seen)
        if layout is None:
            layout = self._parse(header, 8 + len(header), len(value))
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[seen] = layout
        return layout

    def _parse(self, header: bytes, start: int, end: int) -> Layout:
        entries = parse_header(header)
        return plan({name: start + _offset(name, entries, end - start) for name in self._bands})


def offsets_60m(value: memoryview) -> dict[str, int]:
    """First byte of the 60 m bands that a value holds.

    Raises:
        DamagedValueError: The value is not safetensors, or such a band is not what it must be.
    """
    header = header_of(value)
    start, entries = 8 + len(header), parse_header(header)
    return {name: start + _offset(name, entries, len(value) - start) for name in S2_60M_BANDS if name in entries}


def header_of(value: memoryview) -> bytes:
    """The bytes of a value's header.

    Raises:
        DamagedValueError: It cannot be as long as the value says.
    """
    length = int.from_bytes(value[:8], "little")
    if len(value) < 8 or length > min(MAX_HEADER, len(value) - 8):
        raise DamagedValueError(f"no safetensors: {len(value)} bytes with a header of {length}")
    return bytes(value[8 : 8 + length])


def parse_header(header: bytes) -> dict[str, Any]:
    """The JSON object of a header.

    Raises:
        DamagedValueError: It is none.
    """
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        raise DamagedValueError("no safetensors: the header is not JSON") from None
    if not isinstance(entries, dict):
        raise DamagedValueError("no safetensors: the header is no JSON object")
    return entries


def _offset(name: str, entries: dict[str, Any], num_data: int) -> int:
    """First byte of a band within the data section, checked against the whole contract."""
    band, entry = (STORED_BANDS | STORED_60M_BANDS)[name], entries.get(name)
    if not isinstance(entry, dict):
        raise DamagedValueError(f"band {name} is missing (there are {', '.join(list(entries)[:14])[:200] or 'none'})")
    want = {"dtype": _DTYPES[band.dtype], "shape": [band.size, band.size]}
    for key, expected in want.items():
        if entry.get(key) != expected:
            fault = BandTypeError if key == "dtype" and isinstance(entry.get(key), str) else DamagedValueError
            raise fault(f"band {name} must have {key} {expected}: found {str(entry.get(key))[:80]}")
    offsets = entry.get("data_offsets")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        raise DamagedValueError(f"band {name} has no data_offsets: found {str(offsets)[:80]}")
    begin, end = offsets
    if not 0 <= begin <= end <= num_data or end - begin != band.num_bytes:
        raise DamagedValueError(
            f"band {name} needs {band.num_bytes} bytes within {num_data}: its data_offsets are {begin}, {end}"
        )
    return int(begin)
