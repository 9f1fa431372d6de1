# SPDX-License-Identifier: Apache-2.0

import signal

import pytest

from kptrace.experiments.interrupts import interruptible, unhurried


def test_a_signal_during_cleanup_waits_for_its_end() -> None:
    """The cleanup runs to its end, then the interrupt is raised."""
    done = []
    with pytest.raises(KeyboardInterrupt), unhurried():
        signal.raise_signal(signal.SIGINT)
        done.append("cleaned")
    assert done == ["cleaned"]


def test_sigterm_ends_the_body_like_an_interrupt() -> None:
    """SIGTERM raises inside, and means afterwards what it meant before."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
