"""A server of S3's protocol for tests, which can be stopped and started again."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import boto3
import pytest
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from tests.conftest import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Server:
    """A server whose objects survive a stop."""

    def __init__(self) -> None:
        self.port = free_port()
        self._server = self._start()

    def _start(self) -> ThreadedMotoServer:
        server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        server.start()
        return server

    def url(self, path: str) -> str:
        return f"s3://{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    @contextmanager
    def gone(self) -> Iterator[None]:
        self._server.stop()
        yield
        self._server = self._start()

    def age(self, bucket: str, prefix: str, days: float) -> None:
        """Make objects older."""
        for key in s3_backends["123456789012"]["aws"].buckets[bucket].keys.values():
            if key.name.startswith(prefix):
                key.last_modified -= timedelta(days=days)

    def put(self, bucket: str, key: str) -> None:
        """Write a small object."""
        s3_backends["123456789012"]["aws"].put_object(bucket, key, b"x")

    def count(self, bucket: str, prefix: str) -> int:
        """Count the objects below a prefix."""
        keys = list(s3_backends["123456789012"]["aws"].buckets[bucket].keys)
        return sum(key.startswith(f"{prefix}/") and not key.endswith("/") for key in keys)

    def stop(self) -> None:
        self._server.stop()


def running() -> Iterator[Server]:
    """Yield a server with an empty bucket, and set its keys in the environment, for a fixture."""
    patch = pytest.MonkeyPatch()
    for name, value in KEYS.items():
        patch.setenv(name, value)
    server = Server()
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.port}").create_bucket(Bucket="lab")
    yield server
    server.stop()
    patch.undo()
