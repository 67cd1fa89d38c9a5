"""viommuctl's entrance."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from viommud.ctl.parser import EXIT_USAGE, build_parser
from viommud.errors import UsageError, ViommudError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run viommuctl with these arguments (default: the process's own); returns its exit status."""
    options = build_parser().parse_args(arguments)
    from viommud.ctl.client import Client, find_socket
    from viommud.ctl.commands import COMMANDS

    try:
        options.path = find_socket(options.socket, options.vm, steering=options.steers)
        with Client(options.path) as client:
            COMMANDS[options.command](client, options)
    except ViommudError as error:
        print(f"viommuctl: error: {error.sentence}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # a pager that was left: nothing more can be printed, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
