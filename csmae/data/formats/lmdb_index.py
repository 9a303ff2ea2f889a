"""Reads the index of an LMDB file: keys, and the offset and size of each value. Nothing in the file is trusted.

The LMDB library maps the file and follows its pages unchecked: a truncated or forged file kills the process (SIGBUS,
SIGSEGV). Reading needs little more than offsets, so the pages are walked and checked here with numpy. Source: LMDB's
``mdb.c``, data version 1.

Layout: a file of pages. Pages 0 and 1 are meta pages; the one with the higher transaction id is valid. A page has a header
of 16 bytes, then 2-byte pointers to its nodes. A branch's nodes point to pages; a leaf's nodes hold values or point to a
run of overflow pages.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from csmae.data.errors import ArchiveError

_PAGE_HEADER = np.dtype([("pgno", "<u8"), ("pad", "<u2"), ("flags", "<u2"), ("lower", "<u2"), ("upper", "<u2")])
_NODE_HEADER = np.dtype([("low", "<u4"), ("flags", "<u2"), ("key_size", "<u2")])
_PAGE_HEADER_BYTES, _NODE_HEADER_BYTES = _PAGE_HEADER.itemsize, _NODE_HEADER.itemsize
_P_BRANCH, _P_LEAF, _P_META = 1, 2, 8
"""Page flags, named as in ``mdb.c``."""
_F_BIGDATA = 1
"""Flag of a node whose value is in overflow pages."""
_META_BYTES = 152
_MAGIC_AND_VERSION = struct.pack("<II", 0xBEEFC0DE, 1)
_MAX_DEPTH = 32
_MAX_KEY_BYTES = 511
"""LMDB's default limit."""
_PAGES_AT_ONCE = 128
"""Pages that are parsed at a time; bounds the memory."""


class Index(NamedTuple):
    """Sorted keys of an LMDB, and where their values are in ``data.mdb``."""

    keys: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    """First byte of each value."""
    sizes: NDArray[np.int64]
    """Bytes of each value."""

    def find(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Return the positions of keys in the index; -1 for a missing key."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        positions = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[positions] == keys, positions, -1)


class _Tree(NamedTuple):
    path: Path
    descriptor: int
    page_size: int
    num_pages: int
    depth: int
    num_entries: int
    root: int

    def damaged(self, text: str) -> ArchiveError:
        return _damaged(self.path, text)


def read_index(folder: Path) -> Index:
    """Walk the tree of ``folder/data.mdb``.

    Raises:
        ArchiveError: The file cannot be read, is truncated, is not an LMDB, or a page is damaged.
    """
    path = folder / "data.mdb"
    try:
        with path.open("rb") as file:
            tree = _read_meta(path, file.fileno())
            leaves = _leaf_pages(tree)
            parts = [_read_leaves(tree, leaves[i : i + _PAGES_AT_ONCE]) for i in range(0, len(leaves), _PAGES_AT_ONCE)]
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}: grant this account read access") from None
    if not parts:
        return Index(np.empty(0, "S1"), np.empty(0, np.int64), np.empty(0, np.int64))
    index = Index(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if len(index.keys) != tree.num_entries or (index.keys[1:] <= index.keys[:-1]).any():
        raise tree.damaged(f"its {len(index.keys)} keys are not the {tree.num_entries} sorted keys that it declares")
    return index


def _damaged(path: Path, text: str) -> ArchiveError:
    return ArchiveError(f"{path}: is damaged: {text}; copy or download it again")


def _read_meta(path: Path, descriptor: int) -> _Tree:
    """Read the tree of the newer meta page."""
    file_size = os.fstat(descriptor).st_size
    page_size = _page_size(path, os.pread(descriptor, _META_BYTES, 0))
    pages = [os.pread(descriptor, _META_BYTES, number * page_size) for number in (0, 1)]
    for number, page in enumerate(pages):
        if (
            len(page) < _META_BYTES
            or int.from_bytes(page[10:12], "little") != _P_META
            or page[16:24] != _MAGIC_AND_VERSION
        ):
            raise _damaged(path, f"page {number} is not a meta page")
    page = max(pages, key=lambda page: int.from_bytes(page[144:152], "little"))
    flags, depth = struct.unpack_from("<HH", page, 92)
    num_entries, root, last_page = struct.unpack_from("<QQQ", page, 120)
    min_size = (last_page + 1) * page_size
    if min_size > file_size:
        raise ArchiveError(f"{path}: is truncated: needs {min_size} bytes, has {file_size}; copy or download it again")
    if flags or (num_entries and not (1 <= depth <= _MAX_DEPTH and root <= last_page)):
        raise _damaged(path, f"its tree has flags {flags}, depth {depth} and root {root}")
    return _Tree(path, descriptor, page_size, last_page + 1, depth, num_entries, root)


def _page_size(path: Path, page: bytes) -> int:
    if page[16:24] != _MAGIC_AND_VERSION:
        raise ArchiveError(
            f"{path}: is not an LMDB (data version 1), or its first page is damaged ({len(page)} bytes read);"
            " copy or download it again"
        )
    size = int.from_bytes(page[40:44], "little")
    if not (512 <= size <= 65536 and size & (size - 1) == 0):
        raise _damaged(path, f"its page size is {size}")
    return size


def _leaf_pages(tree: _Tree) -> NDArray[np.int64]:
    """Return the numbers of the leaf pages in key order."""
    if tree.num_entries == 0:
        return np.empty(0, np.int64)
    level = np.array([tree.root], np.int64)
    visited = 0
    for _ in range(tree.depth - 1):
        visited += len(level)
        parts = [_children(tree, level[i : i + _PAGES_AT_ONCE]) for i in range(0, len(level), _PAGES_AT_ONCE)]
        level = np.concatenate(parts)
        if visited + len(level) > tree.num_pages or len(np.unique(level)) < len(level):
            raise tree.damaged("its pages do not form a tree")
    return level


def _children(tree: _Tree, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of the pages that branch pages point to."""
    nodes = _read_nodes(tree, numbers, _P_BRANCH)
    children: NDArray[np.int64] = nodes.low.astype(np.int64) | nodes.flags.astype(np.int64) << 32
    if (children < 2).any() or (children >= tree.num_pages).any():
        raise tree.damaged("its pages do not form a tree")
    return children


class _Nodes(NamedTuple):
    """Nodes of some pages of one level, in key order."""

    pages: NDArray[np.uint8]
    """Content of the pages (pages, page size)."""
    page: NDArray[np.int64]
    """Row of each node's page in ``pages``."""
    start: NDArray[np.int64]
    """First byte of the node in its page."""
    low: NDArray[np.uint32]
    """The node's first four bytes: size of the value, or low half of the child's page number."""
    flags: NDArray[np.uint16]
    key_size: NDArray[np.int64]

    def read(self, start: NDArray[np.int64], num_bytes: int) -> NDArray[np.uint8]:
        """Return bytes of each node's page (nodes, num_bytes); beyond its end, the page's last byte is repeated."""
        columns = np.minimum(start[:, None] + np.arange(num_bytes), self.pages.shape[1] - 1)
        content: NDArray[np.uint8] = self.pages[self.page[:, None], columns]
        return content


def _read_nodes(tree: _Tree, numbers: NDArray[np.int64], kind: int) -> _Nodes:
    """Read the nodes of pages; each is checked to be inside its page."""
    data = b"".join(os.pread(tree.descriptor, tree.page_size, int(number) * tree.page_size) for number in numbers)
    if len(data) != len(numbers) * tree.page_size:
        raise tree.damaged("it shrank while it was read")
    pages = np.frombuffer(data, np.uint8).reshape(-1, tree.page_size)
    headers = pages[:, :_PAGE_HEADER_BYTES].copy().view(_PAGE_HEADER)[:, 0]
    lower = headers["lower"].astype(np.int64)
    counts = (lower - _PAGE_HEADER_BYTES) // 2
    wrong = (headers["pgno"] != numbers.astype(np.uint64)) | (headers["flags"] != kind)
    wrong |= (counts < 1) | (lower > tree.page_size)
    if wrong.any():
        raise tree.damaged(f"page {numbers[wrong][0]} is not the page that its parent points to")
    page = np.repeat(np.arange(len(pages)), counts)
    pointer = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = pages.view("<u2")[page, _PAGE_HEADER_BYTES // 2 + pointer].astype(np.int64)
    outside = (start < lower[page]) | (start > tree.page_size - _NODE_HEADER_BYTES)
    if outside.any():
        raise tree.damaged(f"page {numbers[page[outside]][0]} has a node outside itself")
    node_headers = pages[page[:, None], start[:, None] + np.arange(_NODE_HEADER_BYTES)].view(_NODE_HEADER)[:, 0]
    key_size = node_headers["key_size"].astype(np.int64)
    # Pointers that share a node, or nodes that overlap, would expand a small file to gigabytes of keys.
    overfull = np.bincount(page, _NODE_HEADER_BYTES + key_size) > tree.page_size - lower
    if overfull.any() or key_size.max() > _MAX_KEY_BYTES:
        raise tree.damaged(f"the nodes of a page among {numbers[0]} to {numbers[-1]} are longer than they can be")
    return _Nodes(pages, page, start, node_headers["low"], node_headers["flags"], key_size)


def _read_leaves(tree: _Tree, numbers: NDArray[np.int64]) -> Index:
    """Read the keys of leaf pages, and where their values are."""
    nodes = _read_nodes(tree, numbers, _P_LEAF)
    sizes, key_end = nodes.low.astype(np.int64), nodes.start + _NODE_HEADER_BYTES + nodes.key_size
    big = nodes.flags == _F_BIGDATA
    wrong = (nodes.flags > _F_BIGDATA) | (nodes.key_size < 1) | (key_end + np.where(big, 8, sizes) > tree.page_size)
    if wrong.any():
        raise tree.damaged(f"leaf page {numbers[nodes.page[wrong]][0]} holds an impossible node")
    overflow = np.minimum(nodes.read(key_end, 8).view("<u8")[:, 0], np.uint64(tree.num_pages)).astype(np.int64)
    inline = numbers[nodes.page] * tree.page_size + key_end
    offsets = np.where(big, overflow * tree.page_size + _PAGE_HEADER_BYTES, inline)
    if (big & (overflow < 2)).any() or (offsets + sizes > tree.num_pages * tree.page_size).any():
        raise tree.damaged("a value is outside the file")
    longest = int(nodes.key_size.max())
    keys = nodes.read(nodes.start + _NODE_HEADER_BYTES, longest)
    keys[np.arange(longest) >= nodes.key_size[:, None]] = 0
    return Index(keys.view(f"S{longest}")[:, 0], offsets, sizes)
