"""Objects by name, in a folder or in object storage: s3://bucket/prefix, gs://bucket/prefix.

The address and the credentials of a service come from the environment, as obstore documents them:
AWS_ACCESS_KEY_ID, AWS_ENDPOINT and so on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.text.finding import ADDRESS

SECONDS = 30.0  # for one request, its answer included
RETRIES = 4  # of a request that fails for a reason that may pass
RETRY_SECONDS = 60.0  # after which no further retry begins
REASONS = {  # by a sign of them in what obstore says
    "TimedOut": "no answer in time",
    "BadScheme": "the address is plain http: set AWS_ALLOW_HTTP=true to allow it",
    "169.254.169.254": "no credentials",
    "Missing AccessKeyId": "no credentials",
    "Unable to recognise URL": "not an address of object storage, such as s3://bucket/prefix",
    "error sending request": "no connection",
    "request or response body error": "the connection breaks again and again",
    "Unable to canonicalize": "no such folder",
    "os error 2)": "no such folder",
    "status code: 5": "the service fails",
}
AGAIN = "write the store again, to another place"
DENIED = "access is denied"
SHORT = ("Requested range was invalid", "status code: 416")  # of an object that ends before
SYSTEM = re.compile(r"\(os error ([0-9]+)\)")  # the number of an error of a file system
LATER = "try again later, or check the network, the address and the credentials"
CREDENTIALS = "check the credentials in the environment: AWS_ACCESS_KEY_ID, AWS_REGION and so on"


class Objects:
    """The objects in one place.

    Args:
        place: a folder, or the address of a prefix in object storage.
        field: the setting that named it, for errors.
        seconds, retries: the limits of a request.

    Raises:
        UserError: the package obstore is missing, or the place can't be used; later: an object
            can't be read or written, after retries.
    """

    def __init__(
        self, place: str, field: str = "path", seconds: float = SECONDS, retries: int = RETRIES
    ) -> None:
        if not place.strip():
            raise UserError("names no place", field=field, value=place, hint="name a folder")
        # Not all of `/` and `s3://`.
        self.place = place if place.endswith("://") else place.rstrip("/") or "/"
        self.is_remote = ADDRESS.match(place) is not None
        self.field = field
        self.seconds = seconds
        self.retries = retries

    @cached_property
    def _api(self) -> Any:
        """The package obstore."""
        try:
            import obstore.exceptions
            import obstore.store
        except ImportError as error:
            raise UserError(
                "a token store needs the package obstore",
                field=self.field,
                value=self.place,
                hint="install it: pip install 'lit_gpt[store]'",
            ) from error
        return obstore

    @cached_property
    def _store(self) -> Any:
        with self._errors("") as obstore:
            if not self.is_remote:
                folder = Path(self.place).expanduser()
                return obstore.store.LocalStore(folder, mkdir=self.field == "out")
            return obstore.store.from_url(
                self.place,
                client_options={
                    "timeout": timedelta(seconds=self.seconds),
                    # From the environment, which these options would hide.
                    "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"),
                },
                retry_config={
                    "max_retries": self.retries,
                    "backoff": {"max_backoff": timedelta(seconds=8)},
                    "retry_timeout": timedelta(seconds=RETRY_SECONDS),
                },
            )

    def get(self, name: str) -> bytes:
        with self._errors(name) as obstore:
            return bytes(obstore.get(self._store, name).bytes())

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start to stop - 1."""
        with self._errors(name) as obstore:
            return bytes(obstore.get_range(self._store, name, start=start, end=stop))

    def put(self, name: str, content: bytes) -> None:
        """Writes an object, whether or not there is one of that name."""
        with self._errors(name) as obstore:
            obstore.put(self._store, name, content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless there is one: of several processes, one alone succeeds."""
        with self._errors(name) as obstore:
            try:
                obstore.put(self._store, name, content, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                # Also if this very write succeeded and only its answer was lost.
                return bytes(obstore.get(self._store, name).bytes()) == content
            return True

    def find(self, name: str) -> bytes | None:
        """The object, or None if there is none."""
        try:
            return self.get(name)
        except MissingObject:
            return None

    def names(self, prefix: str) -> set[str]:
        """The names of all objects that begin with this and a slash."""
        with self._errors(prefix) as obstore:
            pages = obstore.list(self._store, prefix)
            return {str(found["path"]) for page in pages for found in page}

    @contextmanager
    def _errors(self, name: str) -> Iterator[Any]:
        """Turns errors of obstore, which it gives, into one line without addresses and headers."""
        exceptions = self._api.exceptions
        try:
            yield self._api
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            text = str(error)
            what = f"{self.place}/{name}" if name else self.place
            if isinstance(error, exceptions.NotFoundError | FileNotFoundError):
                if "NoSuchBucket" in text:
                    raise self._refused("there is no such bucket") from error
                raise MissingObject(f"{what} is missing", hint=AGAIN) from error
            if any(sign in text for sign in SHORT):
                raise UserError(f"{what} is truncated", hint=AGAIN) from error
            denied = exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
            if isinstance(error, denied | PermissionError):
                hint = CREDENTIALS if self.is_remote else None
                raise self._refused(f"{what}: {DENIED}", hint) from error
            if isinstance(error, exceptions.BaseError | ValueError | OSError):
                hint = LATER if self.is_remote else None
                raise self._refused(f"{what}: {_reason(text)}", hint) from error
            raise

    def _refused(self, problem: str, hint: str | None = None) -> UserError:
        return UserError(problem, field=self.field, value=self.place, hint=hint)


class MissingObject(UserError):
    """There is no object of this name."""


def _reason(text: str) -> str:
    """The cause in what obstore says, whose later lines are all it knows."""
    for sign, reason in REASONS.items():
        if sign in text:
            return reason
    if found := SYSTEM.search(text):
        return os.strerror(int(found[1]))
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "unknown error"
