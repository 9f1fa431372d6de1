# SPDX-License-Identifier: Apache-2.0

import sys

import pytest

from kptrace.experiments import command
from kptrace.model.errors import PrivilegeError, UnsupportedError


def test_a_tool_gets_its_input_and_gives_its_output() -> None:
    """What is fed comes back."""
    assert command.run([sys.executable, "-c", "print(input()[::-1])"], stdin="abc\n") == "cba\n"


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is the package to install."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UnsupportedError) as caught:
        command.run(["nft", "-f", "-"], stdin="")
    assert "apt-get install nftables" in caught.value.one_line()


def test_a_failing_tool_is_quoted() -> None:
    """The first line that the tool complained with is in the error."""
    with pytest.raises(UnsupportedError, match="no such thing"):
        command.run([sys.executable, "-c", "import sys; sys.exit('no such thing\\nmore')"])


def test_a_refused_tool_is_a_matter_of_privileges() -> None:
    """Operation not permitted leads to the exit code for privileges."""
    with pytest.raises(PrivilegeError):
        command.run([sys.executable, "-c", "import sys; sys.exit('Operation not permitted')"])
