"""Objects by key: in a bucket of S3 or Google Cloud Storage, or as files in a folder."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
from pyarrow import fs

from csmae.atomic import atomic_write
from csmae.config import ConfigError, one_line

PROBE_PREFIX = ".probe-"
"""Prefix of objects that are written to find out whether that is possible; 16 hexadecimal digits follow."""

SCHEMES = ("s3://", "gs://")

RETRY_FOR_S = 600.0
"""Time for which an operation is repeated while a bucket does not answer."""

RETRY_INTERVAL_S = 2.0

Result = TypeVar("Result")

BLOCK_BYTES = 8 * 2**20

ACCESS_REMEDY = "check its name, and that this account may read and write there"

REASONS = {
    "NO_SUCH_BUCKET": "there is no such bucket",
    "Bucket does not exist": "there is no such bucket",
    "ACCESS_DENIED": "these credentials may not use it",
    "INVALID_ACCESS_KEY_ID": "does not know these credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE)",
    "SIGNATURE_DOES_NOT_MATCH": "does not know these credentials (AWS_SECRET_ACCESS_KEY)",
    "UNAUTHENTICATED": "does not know these credentials (GOOGLE_APPLICATION_CREDENTIALS)",
    "No credentials": "no credentials were found (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
    "NETWORK_CONNECTION": "does not answer",
    "Couldn't connect": "does not answer",
    "Could not connect": "does not answer",
}
"""Explanations of pyarrow's errors, by a part of their text."""


@dataclass(frozen=True)
class ObjectStore:
    """Objects below a URL or in a folder.

    Args:
        url: A folder's absolute path, or a URL such as ``s3://bucket/folder``. Options of pyarrow's file systems may follow
            a URL, such as ``?endpoint_override=minio:9000&scheme=http``.
    """

    url: str

    @property
    def folder(self) -> Path | None:
        """The folder that holds the objects; None for a bucket."""
        return None if "://" in self.url else Path(self.url)

    def check(self) -> None:
        """Write, read and remove an object.

        Raises:
            ConfigError: That is impossible.
        """
        key = f"{PROBE_PREFIX}{secrets.token_hex(8)}"
        try:
            files, path = _file_system(self.url)
            if files.get_file_info(path.partition("/")[0]).type == fs.FileType.NotFound:
                raise ConfigError(f"--storage {self.url}: there is no such bucket: create it first, or name another")
            self.put_bytes(key, key.encode())
            read = self.get_bytes(key)
            self.delete([key])
        except (OSError, pyarrow.ArrowException) as error:
            raise unusable_storage(self.url, error) from None
        if read != key.encode():
            raise ConfigError(
                f"--storage {self.url}: reading an object does not return what was just written: use a store with "
                "read-after-write consistency, such as S3"
            )

    def put(self, key: str, path: Path) -> None:
        """Write a file's content to an object.

        Raises:
            OSError: The store does not accept it now; it may hold a part of it.
        """
        with path.open("rb") as source, self._create(key) as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)

    def put_bytes(self, key: str, content: bytes) -> None:
        """Write an object; see ``put`` for errors."""
        with self._create(key) as target:
            target.write(content)

    def _create(self, key: str) -> Any:
        files, root = _file_system(self.url)
        if self.folder:
            files.create_dir(f"{root}/{key}".rpartition("/")[0])
        return files.open_output_stream(f"{root}/{key}")

    def get(self, key: str, path: Path) -> None:
        """Copy an object to a file, which appears whole or not at all.

        Raises:
            FileNotFoundError: There is no such object.
            OSError: The store does not answer, or the disk is full.
        """
        files, root = _file_system(self.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.open_input_stream(f"{root}/{key}") as source, atomic_write(path, concurrent=True) as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)

    def get_bytes(self, key: str) -> bytes | None:
        """Read an object; None if there is none."""
        files, root = _file_system(self.url)
        try:
            with files.open_input_stream(f"{root}/{key}") as source:
                return bytes(source.read())
        except FileNotFoundError:
            return None

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; keys without an object are skipped."""
        files, root = _file_system(self.url)
        for key in keys:
            with suppress(FileNotFoundError):
                files.delete_file(f"{root}/{key}")

    def delete_below(self, prefix: str) -> None:
        """Remove all objects below a prefix."""
        files, root = _file_system(self.url)
        with suppress(FileNotFoundError):
            files.delete_dir(f"{root}/{prefix}")

    def objects(self) -> dict[str, float]:
        """List all objects: by key, the time of the last write in seconds since 1970 by the store's clock."""
        files, root = _file_system(self.url)
        found = files.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
        return {
            entry.path.removeprefix(f"{root}/"): entry.mtime_ns / 1e9
            for entry in found
            if entry.type == fs.FileType.File and entry.mtime_ns is not None
        }

    def names(self, prefix: str) -> list[str]:
        """List the names directly below a prefix."""
        files, root = _file_system(self.url)
        found = files.get_file_info(fs.FileSelector(f"{root}/{prefix}", allow_not_found=True))
        return sorted(entry.base_name for entry in found)


@lru_cache
def _file_system(url: str) -> tuple[Any, str]:
    """Open a store, once per process: its file system, and the path of the objects within."""
    if "://" not in url:
        return fs.LocalFileSystem(), url
    if url.startswith("gs://") and "retry_limit_seconds" not in url:
        url += f"{'&' if '?' in url else '?'}retry_limit_seconds=10"  # pyarrow's default is a quarter of an hour
    try:
        files, path = fs.FileSystem.from_uri(url)
    except pyarrow.ArrowInvalid as error:
        raise unusable_storage(url, error) from None
    return files, path.rstrip("/")


def retry(operation: Callable[[], Result], heartbeat: Callable[[], object] = bool) -> Result:
    """Repeat an operation on a bucket while the bucket does not answer.

    Args:
        operation: Returns the result.
        heartbeat: Called between attempts.

    Raises:
        OSError: The bucket did not answer for ``RETRY_FOR_S``.
    """
    deadline = time.monotonic() + RETRY_FOR_S
    while True:
        try:
            return operation()
        except OSError:
            if time.monotonic() > deadline:
                raise
        heartbeat()
        time.sleep(RETRY_INTERVAL_S)


def unusable_storage(url: str, error: Exception) -> ConfigError:
    """Make the error of a storage that cannot be used."""
    return ConfigError(f"--storage {url}: {describe_error(error)}: {ACCESS_REMEDY}")


def describe_error(error: Exception) -> str:
    """Explain a store's failure in a few words."""
    text = one_line(error, None)
    if isinstance(error, OSError) and error.errno and "Detail: [errno" in text:  # pyarrow's wording for a folder
        return os.strerror(error.errno)
    return next((reason for part, reason in REASONS.items() if part in text), text[:200])
