"""Output that may be gone: a closed pipe, a full disk, a terminal that hung up. A run goes on
without it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Lasting:
    """A stream whose writes never fail: after the first error of the one it wraps, text is
    dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:
            return self._stream.write(
                text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            )
        except (OSError, ValueError):  # ValueError: closed
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Point the descriptor at the null device, so that buffered text and other writers do not
        fail either."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):  # a stream without a descriptor
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """A context in which a failing standard output or error raises nothing where something is
    printed."""
    for descriptor in (0, 1, 2):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        # None: closed when the process began
        lasting = [Lasting(stream or nowhere) for stream in before]
        sys.stdout, sys.stderr = lasting
        try:
            yield
        finally:
            for stream in lasting:
                stream.flush()
            sys.stdout, sys.stderr = before
