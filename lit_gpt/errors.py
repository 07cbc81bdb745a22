"""Owns UserError: what a user did wrong, said in one line; the scripts' options and exit status."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: names the file or option, its value and what to do next."""
