"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from viommud.topology.errors import TopologyError

_MODE = 0o644


def write(path: Path, content: bytes) -> None:
    """Put the content into a file that appears, or takes the place of an older one, when it is complete.

    :raises TopologyError: it cannot be written; an older file stays as it was.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(descriptor, "wb") as stream:
            stream.write(content)
            os.fchmod(stream.fileno(), _MODE)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise TopologyError(f"{path}: cannot be written: {error.strerror}") from error
