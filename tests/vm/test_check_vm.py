# SPDX-License-Identifier: Apache-2.0
"""`kptrace check` on each kernel: neither more nor less than the support table promises."""

import platform
import subprocess
from typing import Any

from tools.vm.matrix import Kernel

_SUCCESS, _UNSUPPORTED = 0, 4


def test_each_feature_is_as_promised(checked: Any, features: dict[str, bool]) -> None:
    """A feature is supported exactly where its first version and the boot options say so; no probe is undecided."""
    answers = {row["name"]: row for row in checked["features"]}
    expected = {name: "supported" if has else "unsupported" for name, has in features.items()}
    wrong = [answers[name] for name, state in expected.items() if answers[name]["state"] != state]
    assert not wrong
    assert answers.keys() == expected.keys()


def test_each_mechanism_is_as_promised(checked: Any, mechanisms: list[tuple[str, str]]) -> None:
    """The mechanisms that check would use are the promised ones, and each other one has a reason."""
    active = [(row["signal"], row["mechanism"]) for row in checked["signals"] if row["state"] == "active"]
    assert active == mechanisms
    assert all(row["reason"] and row["detail"] for row in checked["signals"] if row["state"] != "active")


def test_check_sees_the_kernel_as_it_was_booted(checked: Any, kernel: Kernel) -> None:
    """Release and lockdown in the answer are those of the running kernel."""
    assert checked["kernel"] == platform.release()
    locked = "lockdown=confidentiality" in kernel.options
    assert ("[confidentiality]" in checked["lockdown"]) == locked


def test_strict_tells_whether_the_main_job_works(mechanisms: list[tuple[str, str]]) -> None:
    """`kptrace check --strict` succeeds where look-ups and rewrites can both be measured, and ends with 4 elsewhere."""
    done = subprocess.run(["kptrace", "check", "--strict"], capture_output=True, text=True, check=False)
    both = {signal for signal, _ in mechanisms} >= {"lookup", "rewrite"}
    assert done.returncode == (_SUCCESS if both else _UNSUPPORTED)
    assert done.stderr == ""
    assert f"Linux {platform.release()}" in done.stdout
