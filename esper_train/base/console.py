"""Output that may be gone: a closed pipe, a full disk, a terminal that hung up. A run goes on
without it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Lasting:
    """A stream like the one it is given; what that one cannot take is dropped, from its first
    failure on."""

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
        """Lead the descriptor elsewhere, so that what is still in a buffer, or written by others,
        does not fail too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):  # a stream without a descriptor
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, no fault of standard output or standard error reaches who prints."""
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
