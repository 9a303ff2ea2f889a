"""A bucket of S3 or of Google Cloud Storage: objects by key."""

from __future__ import annotations

import os
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

from csmae.config import ConfigError

CHECK = ".check-"
"""Prefix of objects that are written to see whether that is possible."""

SCHEMES = ("s3://", "gs://")

RETRY_FOR_S = 600.0
"""With a bucket that does not answer."""

RETRY_S = 2.0

Result = TypeVar("Result")

BLOCK_BYTES = 8 * 2**20

ACCESS = "see that its name is right, and that this account may read and write there"

REASONS = {
    "NO_SUCH_BUCKET": "there is no such bucket",
    "ObjectStore does not exist": "there is no such bucket",
    "ACCESS_DENIED": "these credentials may not use it",
    "INVALID_ACCESS_KEY_ID": "does not know these credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE)",
    "SIGNATURE_DOES_NOT_MATCH": "does not know these credentials (AWS_SECRET_ACCESS_KEY)",
    "UNAUTHENTICATED": "does not know these credentials (GOOGLE_APPLICATION_CREDENTIALS)",
    "No credentials": "no credentials were found (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
    "NETWORK_CONNECTION": "does not answer",
    "Couldn't connect": "does not answer",
    "Could not connect": "does not answer",
}
"""What a failure means, by a part of its text."""


@dataclass(frozen=True)
class ObjectStore:
    """Objects below a URL.

    Args:
        url: Such as ``s3://bucket/folder``; options of pyarrow's file systems may follow, such as
            ``?endpoint_override=minio:9000&scheme=http``.
    """

    url: str

    def check(self) -> None:
        """Write, read and remove an object.

        Raises:
            ConfigError: It is impossible.
        """
        key = f"{CHECK}{os.urandom(8).hex()}"
        try:
            files, path = _open(self.url)
            if files.get_file_info(path.partition("/")[0]).type == fs.FileType.NotFound:
                raise ConfigError(f"--storage {self.url}: there is no such bucket: make it first, or name another")
            self.put_bytes(key, key.encode())
            read = self.get_bytes(key)
            self.delete([key])
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"--storage {self.url}: {reason(error)}: {ACCESS}") from None
        if read != key.encode():
            raise ConfigError(
                f"--storage {self.url}: what is written there is not what is read again: use a store that reads its own writes at once, such as S3"
            )

    def put(self, key: str, path: Path) -> None:
        """Write a file's content.

        Raises:
            OSError: The bucket does not take it now; a part of it may be there.
        """
        files, root = _open(self.url)
        with path.open("rb") as source, files.open_output_stream(f"{root}/{key}") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)

    def put_bytes(self, key: str, content: bytes) -> None:
        """Write an object; as ``put``."""
        files, root = _open(self.url)
        with files.open_output_stream(f"{root}/{key}") as target:
            target.write(content)

    def get(self, key: str, path: Path) -> None:
        """Copy an object to a file, which appears whole or not at all.

        Raises:
            FileNotFoundError: There is no such object.
            OSError: The bucket does not give it now, or the disk is full.
        """
        files, root = _open(self.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with files.open_input_stream(f"{root}/{key}") as source, draft.open("wb") as target:
                shutil.copyfileobj(source, target, BLOCK_BYTES)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def get_bytes(self, key: str) -> bytes | None:
        """An object's content; None where there is none."""
        files, root = _open(self.url)
        try:
            with files.open_input_stream(f"{root}/{key}") as source:
                return bytes(source.read())
        except FileNotFoundError:
            return None

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are gone already are no matter."""
        files, root = _open(self.url)
        for key in keys:
            with suppress(FileNotFoundError):
                files.delete_file(f"{root}/{key}")

    def delete_below(self, prefix: str) -> None:
        """Remove all objects below a prefix."""
        files, root = _open(self.url)
        with suppress(FileNotFoundError):
            files.delete_dir(f"{root}/{prefix}")

    def objects(self) -> dict[str, float]:
        """All objects by key, with the seconds since 1970 at which the bucket got them."""
        files, root = _open(self.url)
        found = files.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
        return {
            entry.path.removeprefix(f"{root}/"): entry.mtime_ns / 1e9
            for entry in found
            if entry.type == fs.FileType.File and entry.mtime_ns is not None
        }

    def names(self, prefix: str) -> list[str]:
        """What lies directly below a prefix."""
        files, root = _open(self.url)
        found = files.get_file_info(fs.FileSelector(f"{root}/{prefix}", allow_not_found=True))
        return sorted(entry.base_name for entry in found)


@lru_cache
def _open(url: str) -> tuple[Any, str]:
    """File system and path, one for all of a process."""
    if url.startswith("gs://") and "retry_limit_seconds" not in url:
        url += f"{'&' if '?' in url else '?'}retry_limit_seconds=10"  # pyarrow's default is a quarter of an hour
    try:
        files, path = fs.FileSystem.from_uri(url)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"--storage {url}: {reason(error)}: {ACCESS}") from None
    return files, path.rstrip("/")


def retry(act: Callable[[], Result], beat: Callable[[], object] = bool) -> Result:
    """Do something with a bucket, again and again while it does not answer.

    Args:
        act: What to do.
        beat: Called between attempts.

    Raises:
        OSError: It did not answer for ``RETRY_FOR_S``.
    """
    deadline = time.monotonic() + RETRY_FOR_S
    while True:
        try:
            return act()
        except OSError:
            if time.monotonic() > deadline:
                raise
        beat()
        time.sleep(RETRY_S)


def reason(error: Exception) -> str:
    """What a bucket's failure means, in words."""
    text = " ".join(str(error).split())
    return next((words for part, words in REASONS.items() if part in text), text[:200])
