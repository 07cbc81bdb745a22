"""Owns UserError: what a user did wrong, said in one line; the scripts' options and exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: names the file or option, its value and what to do next."""


class Parser(argparse.ArgumentParser):
    """Options of a script; wrong ones are a UserError."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists all options)")


def at_least_one(text: str) -> int:
    """The `type` of a script's option that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def run(main: Callable[[], int | None]) -> int:
    """Runs a script's `main`; a UserError becomes one `error: ...` line and exit status 2."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows "?"
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training handles it, or while generating
        return 130
    except BrokenPipeError:  # the reader left, as in `generate.py | head`: nobody to tell
        sys.stderr.close()
        return 141
