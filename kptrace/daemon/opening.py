# SPDX-License-Identifier: Apache-2.0
"""The node that all parts share, opened before anything is attached: what a user may have got wrong is said first."""

from contextlib import ExitStack

from kptrace.daemon.loop import Loop
from kptrace.daemon.part import Node, Shared
from kptrace.daemon.recent import FlightRecorder
from kptrace.daemon.settings import Settings, programming_off
from kptrace.dataplanes.services_touched import index_of, services_touched
from kptrace.dataplanes.told import Touched
from kptrace.identity.resources import Level
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.rewrite import Rewrite
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

    def touches(rewrite: Rewrite, data: bytes) -> Touched:
        # For a record, which is rare: an index of all Services would cost every transaction.
        return services_touched(rewrite.dataplane, data, rewrite.size, index_of(identity.snapshot()))

    recorder = FlightRecorder(unix_ns, touches)
    return Node(settings, loop, netns, identity, stack, Shared(recorder=recorder, written=[recorder.written]))
