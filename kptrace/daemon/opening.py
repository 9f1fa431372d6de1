# SPDX-License-Identifier: Apache-2.0
"""The node that all parts share, opened before anything is attached: what a user may have got wrong is said first."""

from collections.abc import Sequence
from contextlib import ExitStack

from kptrace.daemon.loop import Loop
from kptrace.daemon.part import Node, Shared
from kptrace.daemon.recent import FlightRecorder, Written
from kptrace.daemon.settings import Settings, programming_off
from kptrace.dataplanes.services_touched import index_of, services_touched
from kptrace.dataplanes.told import EVERYTHING, Touched
from kptrace.identity.resources import Level
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.identity import ServicePort
from kptrace.signals.clocks import unix_ns


def open_node(settings: Settings, loop: Loop, stack: ExitStack) -> Node:
    """Open the namespace and the names; they are closed with `stack`.

    Raises:
        UsageError, ManifestError: the settings lead nowhere.
    """
    netns = NetworkNamespace(settings.netns)
    stack.callback(netns.close)
    identity = Identity.open(
        IdentitySettings(
            level=Level(settings.identity),
            file=settings.identity_file,
            kubeconfig=settings.kubeconfig,
            node=settings.node_name,
            endpoint_slices=not programming_off(settings),
            start_delay=settings.start_delay,
        )
    )
    stack.callback(identity.close)

    def touches(written: Sequence[Written]) -> Touched:
        # For a record, which is rare: to keep an index of all Services up would cost every change of one.
        index = index_of(identity.snapshot())
        found: set[ServicePort] = set()
        for rewrite, data in written:
            ports = services_touched(rewrite.dataplane, data, rewrite.size, index)
            if ports is EVERYTHING:
                return EVERYTHING
            found |= ports
        return frozenset(found)

    recorder = FlightRecorder(unix_ns, touches)
    return Node(settings, loop, netns, identity, stack, Shared(recorder=recorder, written=[recorder.written]))
