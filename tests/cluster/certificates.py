# SPDX-License-Identifier: Apache-2.0
"""A certificate authority of the test's own, and what it signs: made by openssl."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.programs import ClusterError

_DAYS = "2"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """PEM files of a certificate and its private key."""

    certificate: Path
    key: Path


def _openssl(*arguments: str) -> None:
    try:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ClusterError("openssl is not installed") from error
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"openssl {arguments[0]}: {error.stderr.strip()}") from error


def make_key(path: Path) -> Path:
    """An ECDSA key, in the form that the API server takes for the tokens of service accounts too."""
    _openssl("ecparam", "-genkey", "-noout", "-name", "prime256v1", "-out", str(path))
    return path


class Authority:
    """A certificate authority whose files are all in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pair = self._make("ca", "/CN=kptrace-test-ca", ("basicConstraints=critical,CA:TRUE",), None)

    @property
    def certificate(self) -> Path:
        """What a client trusts."""
        return self.pair.certificate

    def client(self, name: str, *, group: str = "") -> KeyPair:
        """A certificate that the API server takes for this user, a member of this group."""
        subject = f"/O={group}/CN={name}" if group else f"/CN={name}"
        return self._make(name.replace(":", "-"), subject, ("extendedKeyUsage=clientAuth",), self.pair)

    def server(self, name: str, *alternatives: str) -> KeyPair:
        """A certificate for a server of these names (`DNS:localhost`, `IP:127.0.0.1`)."""
        extensions = (f"subjectAltName={','.join(alternatives)}", "extendedKeyUsage=serverAuth")
        return self._make(name, f"/CN={name}", extensions, self.pair)

    def _make(self, name: str, subject: str, extensions: tuple[str, ...], signer: KeyPair | None) -> KeyPair:
        pair = KeyPair(self._folder / f"{name}.crt", make_key(self._folder / f"{name}.key"))
        signing = ["-CA", str(signer.certificate), "-CAkey", str(signer.key)] if signer else []
        added = [word for extension in extensions for word in ("-addext", extension)]
        _openssl(
            *("req", "-x509", "-new", "-days", _DAYS, "-subj", subject, "-key", str(pair.key)),
            *("-out", str(pair.certificate), *signing, *added),
        )
        return pair
