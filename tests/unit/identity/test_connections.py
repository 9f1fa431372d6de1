# SPDX-License-Identifier: Apache-2.0
import shutil
import ssl
from pathlib import Path

import pytest

from kptrace.identity.api import ApiError
from kptrace.identity.connections import connect

AUTHORITIES = ssl.get_default_verify_paths().cafile or ssl.get_default_verify_paths().openssl_cafile


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """What the kubelet mounts in a pod."""
    if not Path(AUTHORITIES).is_file():
        pytest.skip("needs the system's certificate authorities")
    shutil.copy(AUTHORITIES, tmp_path / "ca.crt")
    (tmp_path / "token").write_text("one\n", encoding="ascii")
    return tmp_path


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("10.96.0.1", "443", "https://10.96.0.1:443"),
        ("fd00:96::1", "6443", "https://[fd00:96::1]:6443"),
        ("kubernetes.default.svc", "", "https://kubernetes.default.svc:443"),
    ],
)
def test_a_pod_knows_its_api_server(host: str, port: str, url: str, account: Path) -> None:
    """By two variables, in either family."""
    environ = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    assert connect(environ=environ, account=account).host == url


def test_each_request_has_the_token_of_the_moment(account: Path) -> None:
    """The kubelet replaces the file; what is read then is the new one."""
    found = connect(environ={"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, account=account)
    assert found.authorization() == "Bearer one"
    (account / "token").write_text("two", encoding="ascii")
    assert found.authorization() == "Bearer two"


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_an_account_without_an_authority_is_no_configuration(content: str | None, tmp_path: Path) -> None:
    """A pod without its mount, or with something else in it, is told apart from a server that does not answer."""
    if content is not None:
        (tmp_path / "ca.crt").write_text(content, encoding="ascii")
    with pytest.raises(ApiError) as refused:
        connect(environ={"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, account=tmp_path)
    assert refused.value.reason == "no_configuration"
