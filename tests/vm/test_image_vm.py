# SPDX-License-Identifier: Apache-2.0
"""The machine is what a node with the image is: the installed kptrace, and nothing that a node has not."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

import kptrace


def test_kptrace_is_the_image_s() -> None:
    """The package under test and the command are the ones that the image installs, not the working tree's."""
    assert Path(kptrace.__file__).is_relative_to("/opt/kptrace")
    assert shutil.which("kptrace") == "/opt/kptrace/bin/kptrace"
    done = subprocess.run(["kptrace", "version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kptrace.__version__


def test_there_are_no_kernel_headers() -> None:
    """Neither the modules' build link nor a headers package nor IKHEADERS is there."""
    found = [
        path
        for root, pattern in (
            ("/lib/modules", "*/build"),
            ("/lib/modules", "*/source"),
            ("/usr/src", "linux-headers*"),
        )
        for path in Path(root).glob(pattern)
    ]
    assert not found
    assert not Path("/sys/kernel/kheaders.tar.xz").exists()


@pytest.mark.parametrize("compiler", ["cc", "gcc", "clang", "tcc", "ld"])
def test_there_is_no_compiler(compiler: str) -> None:
    """Nothing can compile here but BCC."""
    assert shutil.which(compiler) is None
    assert importlib.util.find_spec("bcc") is not None
