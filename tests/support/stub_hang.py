"""A training whose first two workers on a node hang before they take a trial; later ones do not."""

import os
import tempfile
import time
from pathlib import Path

from tests.support.stub_training import quick

__all__ = ["quick"]

marks = Path(tempfile.gettempdir())
(marks / f"csmae-hang-{os.getppid()}-{os.getpid()}").touch()  # the parent is the node's raylet
if len(list(marks.glob(f"csmae-hang-{os.getppid()}-*"))) <= 2:
    time.sleep(3600)
