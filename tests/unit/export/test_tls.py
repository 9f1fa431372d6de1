# SPDX-License-Identifier: Apache-2.0
"""HTTPS and client certificates, with certificates made for the test."""

import os
import shutil
import socket
import ssl
import subprocess
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from kptrace.export.server import Limits, TlsFiles
from kptrace.model.errors import ListenError
from tests.unit.export.conftest import Serve
from tests.unit.export.fakes import get

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def openssl(*arguments: str | Path) -> None:
    """Run openssl."""
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_pair(folder: Path, name: str, *, ca: str = "") -> tuple[Path, Path]:
    """A certificate and its key, signed by itself or by the pair that `ca` names."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    signer: list[str | Path] = []
    if ca:
        signer = ["-CA", folder / f"{ca}.crt", "-CAkey", folder / f"{ca}.key"]
        signer += ["-addext", "basicConstraints=critical,CA:FALSE"]
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", *signer,
        "-keyout", key, "-out", certificate,
    )  # fmt: skip
    return certificate, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server and a client that it signed, and a stranger."""
    made = tmp_path_factory.mktemp("tls")
    make_pair(made, "ca")
    make_pair(made, "server", ca="ca")
    make_pair(made, "client", ca="ca")
    make_pair(made, "stranger")
    return made


def files(folder: Path, *, client_ca: bool = False) -> TlsFiles:
    """The server's files."""
    return TlsFiles(folder / "server.crt", folder / "server.key", folder / "ca.crt" if client_ca else None)


def client(folder: Path, name: str = "") -> ssl.SSLContext:
    """A client that trusts the CA and shows the named certificate."""
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    if name:
        context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
    return context


def test_scrapes_by_https(serve: Serve, folder: Path) -> None:
    """A client that trusts the CA scrapes; plain HTTP to the same port gets nothing and disturbs nobody."""
    port = serve(tls=files(folder)).port
    status, _, body = get(port, "/metrics", tls=client(folder))
    assert status == 200
    assert b"kptrace_packets_total" in body
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        plain.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        with suppress(ConnectionResetError):
            assert b"kptrace" not in plain.recv(1000)
    assert get(port, "/healthz", tls=client(folder))[0] == 200


def test_old_tls_is_refused(serve: Serve, folder: Path) -> None:
    """TLS 1.2 is the oldest that is spoken."""
    port = serve(tls=files(folder)).port
    new, old = client(folder), client(folder)
    new.maximum_version = ssl.TLSVersion.TLSv1_2
    assert get(port, "/healthz", tls=new)[0] == 200
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"(?i)version"):
        get(port, "/healthz", tls=old)


def test_client_certificates_are_demanded(serve: Serve, folder: Path) -> None:
    """Only a client that the CA signed is answered."""
    port = serve(tls=files(folder, client_ca=True)).port
    assert get(port, "/metrics", tls=client(folder, "client"))[0] == 200
    for name in ("", "stranger"):
        with pytest.raises(OSError):  # a TLS alert or a reset, as the timing has it
            get(port, "/metrics", tls=client(folder, name))
    assert get(port, "/metrics", tls=client(folder, "client"))[0] == 200


def test_a_slow_handshake_keeps_nobody_waiting(serve: Serve, folder: Path) -> None:
    """Clients that never begin to speak TLS do not stop others, and are let go."""
    port = serve(tls=files(folder), limits=Limits(timeout=0.5, connections=4)).port
    silent = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(8)]
    assert get(port, "/healthz", tls=client(folder))[0] == 200
    for each in silent:
        try:
            assert each.recv(1) == b""
        except ConnectionResetError:
            continue  # let go even sooner, to make room
        finally:
            each.close()


def test_renewed_files_are_used(serve: Serve, tmp_path: Path) -> None:
    """A replaced certificate is shown to the next client; a broken one is not, and the former stays."""
    make_pair(tmp_path, "ca")
    make_pair(tmp_path, "server", ca="ca")
    port = serve(tls=files(tmp_path)).port
    former = client(tmp_path)
    assert get(port, "/healthz", tls=former)[0] == 200
    (tmp_path / "server.crt").write_text("half a certi")
    assert get(port, "/healthz", tls=former)[0] == 200
    make_pair(tmp_path, "ca")
    make_pair(tmp_path, "server", ca="ca")
    assert get(port, "/healthz", tls=client(tmp_path))[0] == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        get(port, "/healthz", tls=former)


def test_a_missing_file_is_named(folder: Path) -> None:
    """The error names the file that cannot be read, whichever it is."""
    missing = folder / "missing.pem"
    for files_ in (
        TlsFiles(missing, folder / "server.key"),
        TlsFiles(folder / "server.crt", missing),
        TlsFiles(folder / "server.crt", folder / "server.key", missing),
    ):
        with pytest.raises(ListenError, match=r"missing\.pem: No such file") as refused:
            files_.context()
        assert refused.value.remedy


def test_a_file_of_another_kind_is_named(folder: Path, tmp_path: Path) -> None:
    """Garbage, a key in the certificate's place and a certificate in the key's place are each named."""
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(os.urandom(100))
    with pytest.raises(ListenError, match=r"garbage\.pem holds no CERTIFICATE"):
        TlsFiles(garbage, folder / "server.key").context()
    with pytest.raises(ListenError, match=r"server\.crt holds no PRIVATE KEY"):
        TlsFiles(folder / "server.crt", folder / "server.crt").context()
    with pytest.raises(ListenError, match=r"server\.key holds no CERTIFICATE"):
        TlsFiles(folder / "server.crt", folder / "server.key", folder / "server.key").context()


def test_files_that_do_not_belong_together_are_named(folder: Path) -> None:
    """A key of another certificate is an error with both names."""
    with pytest.raises(ListenError, match=r"server\.crt .*stranger\.key"):
        TlsFiles(folder / "server.crt", folder / "stranger.key").context()


def test_an_encrypted_key_asks_nobody(folder: Path, tmp_path: Path) -> None:
    """A key with a passphrase is an error at once, not a question at the terminal."""
    locked = tmp_path / "locked.key"
    openssl("ec", "-in", folder / "server.key", "-aes128", "-passout", "pass:x", "-out", locked)
    with pytest.raises(ListenError, match=r"locked\.key"):
        TlsFiles(folder / "server.crt", locked).context()
