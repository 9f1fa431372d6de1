# SPDX-License-Identifier: Apache-2.0
"""Batches as nft 1.0.6 and iptables-nft-restore 1.8.9 sent them for input like kube-proxy's, taken by strace."""

from pathlib import Path

DATA = Path(__file__).parent / "data"


def captured(name: str) -> bytes:
    """One batch."""
    return bytes.fromhex((DATA / f"{name}.hex").read_text(encoding="ascii"))
