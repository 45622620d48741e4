"""Reads files of a web server from front to back, and tries again after temporary failures."""

import logging
import re
import socket
import ssl
import time
from contextlib import AbstractContextManager, suppress
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

TIMEOUT_SECONDS = 60
RETRY_DELAYS = (1, 2, 4, 8, 16, 30)  # seconds before each further try; their sum is the time of a server's restart
TRANSIENT = (408, 425, 429)  # status codes of temporary failures, in addition to all 5xx
CHUNK = 1 << 16

log = logging.getLogger(__name__)


class Version(NamedTuple):
    """Properties of a remote file that reveal a change; None if the server does not state them.

    Attributes:
        size: number of bytes.
        tag: entity tag.
        modified: time of the last change.
    """

    size: int | None
    tag: str | None
    modified: str | None

    def is_other_than(self, other: "Version") -> bool:
        """Checks whether two versions differ in a property that both have."""
        return any(a != b for a, b in zip(self, other, strict=True) if a is not None and b is not None)


class HttpFile(AbstractContextManager["HttpFile"]):
    """A remote file as `tar.Readable`; reading resumes at the same byte after a broken connection.

    Files of fsspec are unsuitable: they neither try again nor detect a change between two requests, and their event
    loop does not survive the fork of loader workers.

    Args:
        url: address, http or https.
        is_first_contact: raise an error at once if the host is unknown or refuses to connect, since its name may be
            wrong.

    Raises:
        ValueError: in every method, if the server refuses, the file has changed between two requests, or all tries
            have failed.
    """

    def __init__(self, url: str, *, is_first_contact: bool = False) -> None:
        try:
            urlsplit(url).port  # noqa: B018  # parses the address
        except ValueError as error:
            raise ValueError(f"{url!r} is no valid address: {error}") from error
        self.url, self.is_first_contact = url, is_first_contact
        self._offset = self._failures = self._failed_at = 0
        self._version: Version | None = None
        self._response: HTTPResponse | None = None

    def __exit__(self, *error: object) -> None:
        self._close()

    def read(self, size: int, /) -> bytes:
        """Reads this number of bytes, or fewer at the end of the file."""
        parts = []
        while size and (part := self._part(min(size, CHUNK))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def seek(self, offset: int, /) -> int:
        """Moves forward to an offset by reading."""
        while self._offset < offset and self._part(min(offset - self._offset, CHUNK)):
            pass
        return self._offset

    def _part(self, size: int) -> bytes:
        while True:
            try:
                return self._receive(size)
            except (OSError, HTTPException) as error:
                self._close()
                self._wait_after(error)

    def _wait_after(self, error: OSError | HTTPException) -> None:
        if self._offset - self._failed_at >= CHUNK:
            self._failures = 0
        self._failed_at = self._offset
        place = f"{self.url} at byte {self._offset}"
        if not self._may_pass(error):
            raise ValueError(f"cannot read {self.url}: {error}; check the address and the network") from error
        if self._failures == len(RETRY_DELAYS):
            raise ValueError(f"cannot read {place}, after {self._failures + 1} tries: {error}") from error
        delay = RETRY_DELAYS[self._failures]
        self._failures += 1
        log.warning("cannot read %s: %s; try %d follows in %g s", place, error, self._failures + 1, delay)
        time.sleep(delay)

    def _may_pass(self, error: OSError | HTTPException) -> bool:
        if isinstance(error, HTTPError):
            return error.code in TRANSIENT or error.code >= 500
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, (ConnectionRefusedError, socket.gaierror)):
            return not self.is_first_contact
        return isinstance(cause, (OSError, HTTPException)) and not isinstance(
            cause, (ssl.SSLCertVerificationError, InvalidURL)
        )

    def _receive(self, size: int) -> bytes:
        total = self._version.size if self._version else None
        if self._response is None:
            if self._offset == total:
                return b""
            self._response = self._request()
            total = self._version.size if self._version else None
        data = self._response.read(size)
        if not data and total is not None and self._offset < total:
            raise ConnectionError(f"the connection ended before byte {total}")
        self._offset += len(data)
        return data

    def _request(self) -> HTTPResponse:
        headers = {"Range": f"bytes={self._offset}-"} if self._offset else {}
        address = quote(self.url, safe="%/:=&?~#+!$,;'@()*[]")
        response: HTTPResponse = urlopen(Request(address, headers=headers), timeout=TIMEOUT_SECONDS)
        begin, size = 0, response.length
        if response.status == 206:
            extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers["Content-Range"] or "")
            begin = int(extent[1]) if extent else -1
            size = int(extent[2]) if extent and extent[2] != "*" else None
        version = Version(size, response.headers["ETag"], response.headers["Last-Modified"])
        if (self._version and version.is_other_than(self._version)) or begin not in (0, self._offset):
            response.close()
            raise ValueError(f"{self.url} has changed while it was read; start again")
        self._version = self._version or version
        while begin < self._offset:  # the server ignores ranges and sends the whole file
            if not (skipped := response.read(min(self._offset - begin, CHUNK))):
                raise ConnectionError(f"the connection ended before byte {self._offset}")
            begin += len(skipped)
        return response

    def _close(self) -> None:
        if self._response is not None:
            with suppress(OSError):
                self._response.close()
            self._response = None
