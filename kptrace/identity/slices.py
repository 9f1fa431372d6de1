# SPDX-License-Identifier: Apache-2.0
"""EndpointSlices, as `identity.wire` has them, reduced to what names need."""

import itertools
import sys
from collections.abc import Iterator

from kptrace.identity import wire
from kptrace.identity.fields import instant_of, ip_of, port_of, protocol_of
from kptrace.identity.named import metadata_of, name_of
from kptrace.identity.packing import READY, SERVING, TERMINATING, BackEnd, pack
from kptrace.identity.policies import hints_of
from kptrace.identity.records import SliceRecord

_NO_LABELS = wire.Labels()
_NOWHERE: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
_SAID = (None, False, True)
#: What is not said of an endpoint is: it is ready, it serves, and it does not end.
_CONDITIONS = {
    (ready, serving, ending): READY * (ready is not False)
    | SERVING * (serving is not False)
    | TERMINATING * bool(ending)
    for ready, serving, ending in itertools.product(_SAID, repeat=3)
}


def slice_record(found: wire.EndpointSlice) -> SliceRecord:
    """The record of an EndpointSlice.

    Raises:
        ObjectError: a field is of the wrong type, or no name, address, port or protocol where it must be one.
    """
    namespace, name = name_of(found)
    metadata = metadata_of(found)
    labels = metadata.labels or _NO_LABELS
    back_ends = tuple(_back_ends(found))
    if labels.foreign:
        return SliceRecord(namespace, name)
    by_port = []
    for index, port in enumerate(found.ports or ()):
        number = port_of(port.port, f"ports[{index}].port")
        if number:
            by_port.append(
                ((port.name or "", protocol_of(port.protocol, f"ports[{index}].protocol")), number)
            )
    trigger = instant_of(metadata.annotations.trigger if metadata.annotations else None)
    return SliceRecord(
        namespace, name, sys.intern(labels.service_name or ""), pack(by_port, back_ends), trigger
    )


def _back_ends(found: wire.EndpointSlice) -> Iterator[BackEnd]:
    if found.address_type == "FQDN":
        return
    for index, endpoint in enumerate(found.endpoints or ()):
        if not endpoint.addresses:
            continue
        # All addresses of one endpoint are said to be equivalent, and kube-proxy takes the first.
        ip = ip_of(endpoint.addresses[0], "endpoints[{}].addresses[0]", index)
        conditions, target, hints = endpoint.conditions, endpoint.target_ref, endpoint.hints
        bits = READY | SERVING
        if conditions is not None:
            bits = _CONDITIONS[conditions.ready, conditions.serving, conditions.terminating]
        pod = f"{target.namespace or ''}/{target.name or ''}" if target and target.kind == "Pod" else ""
        yield ip, endpoint.node_name or "", pod, bits, *(_NOWHERE if hints is None else hints_of(hints))
