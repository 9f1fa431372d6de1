# SPDX-License-Identifier: Apache-2.0
import pytest

from kptrace.identity.resources import Level, resources
from kptrace.model.errors import UsageError

SELECTOR = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"


def test_each_level_watches_what_it_needs_and_no_more() -> None:
    """Nothing, Services by kube-proxy's selector, or also this node and its pods; EndpointSlices by choice."""
    assert resources(Level.NONE, endpoint_slices=True) == ()
    (services,) = resources(Level.SERVICES)
    assert (services.path, services.selectors) == ("/api/v1/services", (("labelSelector", SELECTOR),))
    everything = resources(Level.FULL, node="n1", endpoint_slices=True)
    assert [(found.scope, found.path, dict(found.selectors)) for found in everything] == [
        ("watch_services", "/api/v1/services", {"labelSelector": SELECTOR}),
        ("watch_endpointslices", "/apis/discovery.k8s.io/v1/endpointslices", {"labelSelector": SELECTOR}),
        ("watch_pods", "/api/v1/pods", {"fieldSelector": "spec.nodeName=n1"}),
        ("watch_nodes", "/api/v1/nodes", {"fieldSelector": "metadata.name=n1"}),
    ]


def test_full_needs_the_name_of_the_node() -> None:
    """Without it, the pods of the whole cluster would be watched."""
    with pytest.raises(UsageError, match="name of this node"):
        resources(Level.FULL)
