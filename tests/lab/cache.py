"""Where the lab is kept: ${XDG_CACHE_HOME:-~/.cache}/viommud/lab, beside what guests are made of.

An entry's name has a digest of all that went into it, so that a change makes a new one; older ones of the same kind go.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from vm import assets


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def directory() -> Path:
    """The lab's part of the cache."""
    return assets.cache() / "lab"


def digest(parts: Iterable[bytes | str]) -> str:
    """Twelve digits that change when a part does."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:12]


def entry(kind: str, parts: Iterable[bytes | str], make: Callable[[Path], None]) -> Path:
    """A directory made of these parts; made now if it is not there, by filling a temporary one that is renamed.

    A lock keeps two runs from making the same.
    """
    place = directory() / f"{kind}-{digest(parts)}"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f".{kind}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run makes the {kind}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            return place
        started = time.monotonic()
        temporary = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=place.parent))
        try:
            make(temporary)
            temporary.chmod(0o755)
            for old in place.parent.glob(f"{kind}-*"):
                shutil.rmtree(old)
            temporary.rename(place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        say(f"{kind}: made in {time.monotonic() - started:.0f} s")
    return place
