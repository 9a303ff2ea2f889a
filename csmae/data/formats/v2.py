"""Decodes the values of BigEarthNet v2: safetensors, parsed here because an archive is not trusted.

A value is 8 bytes of header length n, n bytes of JSON (``{"B02": {"dtype", "shape", "data_offsets"}, …}``), then the
pixels. Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import json
from typing import Any

from csmae.data.errors import BandTypeError, DamagedValueError
from csmae.data.formats.layout import STORED_60M_BANDS, STORED_BANDS, Segments, plan_copies
from csmae.sensors import S2_60M_BANDS

MAX_HEADER_BYTES = 64 * 1024
"""A real header has 136 or 824."""

_MAX_CACHED_HEADERS = 256
"""An archive that one program wrote has two different headers."""

_DTYPES = {"<f4": "F32", "<u2": "U16"}


class SafetensorsDecoder:
    """Locates bands in safetensors values; a known header is not parsed again.

    Args:
        bands: Bands that a value must hold; it may hold others.
    """

    def __init__(self, bands: tuple[str, ...]) -> None:
        self._bands = bands
        self._cache: dict[tuple[int, bytes], Segments] = {}

    def __call__(self, value: memoryview) -> Segments:
        """Return where the bands are.

        Raises:
            DamagedValueError: The value is not safetensors, or a band is missing or invalid.
        """
        header = read_header(value)
        key = (len(value), header)
        segments = self._cache.get(key)
        if segments is None:
            start, entries = 8 + len(header), parse_header(header)
            offsets = {name: start + _offset(name, entries, len(value) - start) for name in self._bands}
            segments = plan_copies(offsets)
            if len(self._cache) >= _MAX_CACHED_HEADERS:
                self._cache.clear()
            self._cache[key] = segments
        return segments


def offsets_60m(value: memoryview) -> dict[str, int]:
    """Return the first byte of each 60 m band that a value holds.

    Raises:
        DamagedValueError: The value is not safetensors, or such a band is invalid.
    """
    header = read_header(value)
    start, entries = 8 + len(header), parse_header(header)
    return {name: start + _offset(name, entries, len(value) - start) for name in S2_60M_BANDS if name in entries}


def read_header(value: memoryview) -> bytes:
    """Return the bytes of a value's header.

    Raises:
        DamagedValueError: The header cannot have the length that the value declares.
    """
    length = int.from_bytes(value[:8], "little")
    if len(value) < 8 or length > min(MAX_HEADER_BYTES, len(value) - 8):
        raise DamagedValueError(f"not safetensors: {len(value)} bytes with a header of {length}")
    return bytes(value[8 : 8 + length])


def parse_header(header: bytes) -> dict[str, Any]:
    """Return the JSON object of a header.

    Raises:
        DamagedValueError: The header is not a JSON object.
    """
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        raise DamagedValueError("not safetensors: the header is not JSON") from None
    if not isinstance(entries, dict):
        raise DamagedValueError("not safetensors: the header is not a JSON object")
    return entries


def _offset(name: str, entries: dict[str, Any], num_data_bytes: int) -> int:
    """Return the first byte of a band in the data section, after checking all that the band requires."""
    band, entry = (STORED_BANDS | STORED_60M_BANDS)[name], entries.get(name)
    if not isinstance(entry, dict):
        raise DamagedValueError(f"band {name} is missing (found {', '.join(list(entries)[:14])[:200] or 'none'})")
    for key, expected in {"dtype": _DTYPES[band.dtype], "shape": [band.size, band.size]}.items():
        if entry.get(key) != expected:
            kind = BandTypeError if key == "dtype" and isinstance(entry.get(key), str) else DamagedValueError
            raise kind(f"band {name} must have {key} {expected}: found {str(entry.get(key))[:80]}")
    offsets = entry.get("data_offsets")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        raise DamagedValueError(f"band {name} must have two data_offsets: found {str(offsets)[:80]}")
    start, end = offsets
    if not 0 <= start <= end <= num_data_bytes or end - start != band.num_bytes:
        raise DamagedValueError(
            f"band {name} needs {band.num_bytes} bytes within {num_data_bytes}: its data_offsets are {start}, {end}"
        )
    return int(start)
