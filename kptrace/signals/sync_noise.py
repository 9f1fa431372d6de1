# SPDX-License-Identifier: Apache-2.0
"""What kube-proxy does with its tools that is no sync: canaries, and the clean-up of its other modes. Pure.

At start, in nftables mode, it removes what iptables mode left: `iptables -C` and `-D` of each jump rule, `iptables-save`,
`iptables-restore -T TABLE` (a sync never names a table), `-X` of the canary. In iptables mode it removes what nftables mode
left: `nft --version`, `nft --check -f -`, and an `nft -f -` that deletes the table, or fails where there is none. Every
30 s it asks for its canary. After a failed sync, and at a high log level, it lists its table for people, not as JSON.
"""

from typing import Final

from kptrace.model.rewrite import Rewrite
from kptrace.signals.sync_step import Step
from kptrace.signals.sync_tools import Kind, Role
from kptrace.signals.writers import KUBE_PROXY

_NEVER: Final = frozenset({Role.NONE, Role.DRY})


def is_noise(step: Step) -> bool:
    """Whether a process is never part of a sync, by its command line."""
    tool = step.tool
    if tool.role in _NEVER or tool.canary:
        return True
    if step.writer != KUBE_PROXY or tool.role is Role.CONNTRACK:
        return False
    if tool.kind is Kind.NFT:
        return tool.role is Role.LIST and not tool.json
    return tool.role in (Role.REMOVE, Role.TABLE)


def opens(step: Step) -> bool:
    """Whether a run may begin with a step: what only checks or cleans up belongs to one that is there, or to none."""
    return step.tool.role not in (Role.CHECK, Role.CONNTRACK)


def is_clean_up(rewrite: Rewrite) -> bool:
    """Whether all that a transaction does is to take tables away."""
    return (
        bool(rewrite.objects)
        and not rewrite.truncated
        and all(each.object == "table" and each.operation == "delete" for each in rewrite.objects)
    )
