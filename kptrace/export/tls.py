# SPDX-License-Identifier: Apache-2.0
"""TLS of the metrics server: files, the errors that name them, and their renewal while serving."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import structlog

from kptrace.model.errors import ListenError

_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_KEY = b"PRIVATE KEY-----"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a TLS server; with `client_ca` clients must show a certificate that it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """The TLS context, TLS 1.2 or newer.

        Raises:
            ListenError: a file cannot be read or used; the message names it.
        """
        for path, mark in (
            (self.certificate, _CERTIFICATE),
            (self.key, _KEY),
            (self.client_ca, _CERTIFICATE),
        ):
            if path is not None:
                _must_hold(path, mark)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # Without a password of ours OpenSSL would ask for one at the terminal.
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise ListenError(
                f"the TLS certificate {self.certificate} cannot be used with the key {self.key}: {error}",
                remedy="give PEM files that belong together, the key without a passphrase",
            ) from error
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ValueError) as error:
                raise ListenError(
                    f"the client CA {self.client_ca} cannot be used: {error}",
                    remedy="give a PEM file of certificates",
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes when one of the files is replaced."""
        return tuple(map(_stamp, filter(None, (self.certificate, self.key, self.client_ca))))


class RenewedTls:
    """The context for the next connection: made anew when the files were replaced, as certificates run out."""

    def __init__(self, files: TlsFiles) -> None:
        """Read the files.

        Raises:
            ListenError: one cannot be read or used.
        """
        self._files = files
        self._stamp = files.stamp()
        self._context = files.context()
        self._lock = Lock()

    def current(self) -> ssl.SSLContext:
        """The context of the newest usable files. Thread-safe."""
        with self._lock:
            stamp = self._files.stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                self._renew()
            return self._context

    def _renew(self) -> None:
        log = structlog.get_logger()
        try:
            self._context = self._files.context()
        except ListenError as error:
            log.warning("tls_files_unusable", error=str(error), remedy="the former ones stay in use")
        else:
            log.info("tls_files_renewed", certificate=str(self._files.certificate))


def _must_hold(path: Path, mark: bytes) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ListenError(
            f"cannot read the TLS file {path}: {error.strerror}", remedy="give a readable PEM file"
        ) from error
    if mark not in content:
        raise ListenError(
            f"the TLS file {path} holds no {mark.decode().strip('-').removeprefix('BEGIN ')}",
            remedy="give a PEM file",
        )


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
