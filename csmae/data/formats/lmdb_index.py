"""Where every value of an LMDB file lies, found without trusting a byte of it.

The LMDB library maps the file and follows its pages as they are: a truncated or forged file kills the process
(SIGBUS, SIGSEGV). Reading needs little more than offsets, so the pages are walked here, checked, with numpy. Source:
LMDB's ``mdb.c``, data version 1.

Layout: a file of pages; pages 0 and 1 are meta pages, of which the one with the higher transaction id counts. A page
has a header of 16 bytes, then 2-byte pointers to its nodes. A branch's nodes point to pages, a leaf's hold values or
point to a run of overflow pages.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from csmae.data.formats.layout import ArchiveError

_HEADER = 16
_NODE = 8
_BRANCH, _LEAF = 1, 2
_BIG = 1
_META = (8).to_bytes(2, "little")
_META_BYTES = 152
_MAGIC_AND_VERSION = struct.pack("<II", 0xBEEFC0DE, 1)
_MAX_DEPTH = 32
_MAX_KEY = 511
"""Bytes, as LMDB is built everywhere."""
_BLOCK = 128
"""Pages that are taken apart at a time: bounds the memory."""

_PAGE = np.dtype(
    {"names": ["pgno", "flags", "lower"], "formats": ["<u8", "<u2", "<u2"], "offsets": [0, 10, 12], "itemsize": _HEADER}
)
_NODE_HEAD = np.dtype([("low", "<u4"), ("flags", "<u2"), ("key_size", "<u2")])


class Index(NamedTuple):
    """Keys of an LMDB in their order, and the places of their values in ``data.mdb``."""

    keys: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    """Bytes."""

    def find(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Positions of keys in the index; -1 where there is none."""
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
        ArchiveError: The file cannot be read, is truncated, is no LMDB, or a page is not what it must be.
    """
    path = folder / "data.mdb"
    try:
        with path.open("rb") as file:
            tree = _read_meta(path, file.fileno())
            leaves = _leaf_pages(tree)
            blocks = [_values(tree, leaves[i : i + _BLOCK]) for i in range(0, len(leaves), _BLOCK)]
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}: let this account read it") from None
    if not blocks:
        return Index(np.empty(0, "S1"), np.empty(0, np.int64), np.empty(0, np.int64))
    index = Index(*(np.concatenate(column) for column in zip(*blocks, strict=True)))
    if len(index.keys) != tree.num_entries or (index.keys[1:] <= index.keys[:-1]).any():
        raise tree.damaged(f"its {len(index.keys)} keys are not the {tree.num_entries} that it names, in their order")
    return index


def _damaged(path: Path, text: str) -> ArchiveError:
    return ArchiveError(f"{path}: is damaged: {text}; copy or download it again")


def _read_meta(path: Path, descriptor: int) -> _Tree:
    """The tree of the newer of the two meta pages."""
    file_size = os.fstat(descriptor).st_size
    page_size = _page_size(path, os.pread(descriptor, _META_BYTES, 0))
    pages = [os.pread(descriptor, _META_BYTES, number * page_size) for number in (0, 1)]
    for number, page in enumerate(pages):
        if len(page) < _META_BYTES or page[10:12] != _META or page[16:24] != _MAGIC_AND_VERSION:
            raise _damaged(path, f"page {number} is no meta page")
    page = max(pages, key=lambda page: int.from_bytes(page[144:152], "little"))
    flags, depth = struct.unpack_from("<HH", page, 92)
    num_entries, root, last_page = struct.unpack_from("<QQQ", page, 120)
    needed = (last_page + 1) * page_size
    if needed > file_size:
        raise ArchiveError(f"{path}: is truncated: needs {needed} bytes, has {file_size}; copy or download it again")
    if flags or (num_entries and not (1 <= depth <= _MAX_DEPTH and root <= last_page)):
        raise _damaged(path, f"its tree has flags {flags}, depth {depth} and root {root}")
    return _Tree(path, descriptor, page_size, last_page + 1, depth, num_entries, root)


def _page_size(path: Path, page: bytes) -> int:
    if page[16:24] != _MAGIC_AND_VERSION:
        raise ArchiveError(
            f"{path}: is no LMDB (data version 1), or its first page is damaged ({len(page)} bytes read); copy or download it again"
        )
    size = int.from_bytes(page[40:44], "little")
    if not (512 <= size <= 65536 and size & (size - 1) == 0):
        raise _damaged(path, f"its page size is {size}")
    return size


def _leaf_pages(tree: _Tree) -> NDArray[np.int64]:
    """Numbers of the leaf pages, in key order."""
    if tree.num_entries == 0:
        return np.empty(0, np.int64)
    level = np.array([tree.root], np.int64)
    visited = 0
    for _ in range(tree.depth - 1):
        visited += len(level)
        level = np.concatenate([_children(tree, level[i : i + _BLOCK]) for i in range(0, len(level), _BLOCK)])
        if visited + len(level) > tree.num_pages or len(np.unique(level)) < len(level):
            raise tree.damaged("its pages do not form a tree")
    return level


def _children(tree: _Tree, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the pages that branch pages point to."""
    nodes = _nodes(tree, numbers, _BRANCH)
    children: NDArray[np.int64] = nodes.low.astype(np.int64) | nodes.flags.astype(np.int64) << 32
    if (children < 2).any() or (children >= tree.num_pages).any():
        raise tree.damaged("its pages do not form a tree")
    return children


class _Nodes(NamedTuple):
    """Nodes of some pages of one level, in key order."""

    pages: NDArray[np.uint8]
    page: NDArray[np.int64]
    """Row of each node's page in ``pages``."""
    start: NDArray[np.int64]
    """First byte of the node within its page."""
    low: NDArray[np.uint32]
    """The first four bytes: size of the value, or low half of the child's page number."""
    flags: NDArray[np.uint16]
    key_size: NDArray[np.int64]

    def read(self, start: NDArray[np.int64], num_bytes: int) -> NDArray[np.uint8]:
        """Bytes of each node's page (nodes, num_bytes), repeating the page's last byte beyond its end."""
        columns = np.minimum(start[:, None] + np.arange(num_bytes), self.pages.shape[1] - 1)
        content: NDArray[np.uint8] = self.pages[self.page[:, None], columns]
        return content


def _nodes(tree: _Tree, numbers: NDArray[np.int64], kind: int) -> _Nodes:
    """Nodes of pages, each checked to lie within its page."""
    data = b"".join(os.pread(tree.descriptor, tree.page_size, int(number) * tree.page_size) for number in numbers)
    if len(data) != len(numbers) * tree.page_size:
        raise tree.damaged("it became shorter while it was read")
    pages = np.frombuffer(data, np.uint8).reshape(-1, tree.page_size)
    headers = pages[:, :_HEADER].copy().view(_PAGE)[:, 0]
    lower = headers["lower"].astype(np.int64)
    counts = (lower - _HEADER) // 2
    wrong = (headers["pgno"] != numbers.astype(np.uint64)) | (headers["flags"] != kind)
    wrong |= (counts < 1) | (lower > tree.page_size)
    if wrong.any():
        raise tree.damaged(f"page {numbers[wrong][0]} is not what its parent says")
    page = np.repeat(np.arange(len(pages)), counts)
    slot = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = pages.view("<u2")[page, _HEADER // 2 + slot].astype(np.int64)
    outside = (start < lower[page]) | (start > tree.page_size - _NODE)
    if outside.any():
        raise tree.damaged(f"page {numbers[page[outside]][0]} has a node outside itself")
    heads = pages[page[:, None], start[:, None] + np.arange(_NODE)].view(_NODE_HEAD)[:, 0]
    key_size = heads["key_size"].astype(np.int64)
    # Pointers that share a node, or nodes that overlap, would make much of a little.
    taken = np.bincount(page, _NODE + key_size) > tree.page_size - lower
    if taken.any() or key_size.max() > _MAX_KEY:
        raise tree.damaged(f"the nodes of a page among {numbers[0]} to {numbers[-1]} are longer than they can be")
    return _Nodes(pages, page, start, heads["low"], heads["flags"], key_size)


def _values(tree: _Tree, numbers: NDArray[np.int64]) -> Index:
    """Keys and places of the values of leaf pages."""
    nodes = _nodes(tree, numbers, _LEAF)
    sizes, key_end = nodes.low.astype(np.int64), nodes.start + _NODE + nodes.key_size
    big = nodes.flags == _BIG
    wrong = (nodes.flags > _BIG) | (nodes.key_size < 1) | (key_end + np.where(big, 8, sizes) > tree.page_size)
    if wrong.any():
        raise tree.damaged(f"leaf page {numbers[nodes.page[wrong]][0]} holds a node that cannot be")
    overflow = np.minimum(nodes.read(key_end, 8).view("<u8")[:, 0], np.uint64(tree.num_pages)).astype(np.int64)
    inline = numbers[nodes.page] * tree.page_size + key_end
    offsets = np.where(big, overflow * tree.page_size + _HEADER, inline)
    if (big & (overflow < 2)).any() or (offsets + sizes > tree.num_pages * tree.page_size).any():
        raise tree.damaged("a value lies outside the file")
    longest = int(nodes.key_size.max())
    text = nodes.read(nodes.start + _NODE, longest)
    text[np.arange(longest) >= nodes.key_size[:, None]] = 0
    return Index(text.view(f"S{longest}")[:, 0], offsets, sizes)
