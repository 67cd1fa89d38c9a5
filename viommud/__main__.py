"""The program's entrance: what can be answered at once is answered before anything heavy is imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from viommud import __version__

CAPABILITIES = {"type": "iommu", "features": ["config", "keep-listening"]}
"""For --print-capabilities (QEMU docs/interop/vhost-user.rst, "Backend program conventions").

A feature says that the option of that name is there.  QEMU's schema lists no back-end type "iommu" yet.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run viommud with these command line arguments (default: the process's own); returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--print-capabilities" in given:  # whatever else was said, as the conventions have it
        print(json.dumps(CAPABILITIES))
        return 0
    if "--version" in given:
        print(f"viommud {__version__}")
        return 0
    from viommud.cli import run

    return run(given)


if __name__ == "__main__":
    sys.exit(main())
