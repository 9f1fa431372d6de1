# SPDX-License-Identifier: Apache-2.0
"""Parts of a call that fill it, on a machine that may be interrupted at any time."""

from collections.abc import Callable, Mapping

#: What may be missing, as a share of the call.
NEAR = 0.10
#: Attempts: a host that stalls now and then does not do so every time.
ATTEMPTS = 5


def fills(once: Callable[[], tuple[float, Mapping[str, float]]]) -> Mapping[str, float]:
    """Let a call happen until its parts fill it but for a tenth; no part is ever empty, nor are all longer than the call.

    Whatever interrupts the machine between two parts widens the gap and never narrows it, so the least gap is the parts'
    own, and attempts after the first within a tenth would change nothing. A gap of the parts' own is there every time.

    Args:
        once: makes the call happen; returns its seconds and those of each part.

    Returns:
        The parts of the call that they fill.

    Raises:
        AssertionError: in none of the attempts they did, or one broke what holds always.
    """
    gaps = []
    for _ in range(ATTEMPTS):
        whole, parts = once()
        print(f"the call {whole:.6f} s, its parts {sum(parts.values()):.6f} s: {parts}")
        assert min(parts.values()) > 0
        assert sum(parts.values()) <= whole
        gaps.append(1 - sum(parts.values()) / whole)
        if gaps[-1] <= NEAR:
            return parts
    raise AssertionError(f"the parts never filled the call but for {NEAR:.0%}: {gaps}")
