# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import structlog

from kptrace.identity.feed import Alive, Changed, Listed, Message, Rejected, Trouble
from kptrace.identity.records import Kind, NodeRecord
from kptrace.identity.resources import Level
from kptrace.identity.source import Identity, IdentitySettings
from kptrace.identity.store import Gone
from kptrace.model.errors import ManifestError, UsageError
from kptrace.model.identity import Snapshot
from kptrace.model.metrics import MetricFamily, Sample
from kptrace.model.signal import State

DATA = Path(__file__).parent / "data"


class ScriptedFeed:
    """Gives the messages that a test has put there."""

    source = "api"
    scopes = ("watch_nodes",)
    reasons = ("unreachable",)

    def __init__(self) -> None:
        self.waiting: list[Message] = []
        self.closed = 0

    def start(self) -> None:
        """Nothing to do."""

    def drain(self) -> Sequence[Message]:
        """What waits."""
        found, self.waiting = self.waiting, []
        return found

    def close(self) -> None:
        """Count."""
        self.closed += 1


def values(family: MetricFamily) -> dict[tuple[str, ...], float]:
    """Samples by their labels."""
    return {sample.labels: sample.value for sample in family.samples if isinstance(sample, Sample)}


def listed(at: float, *nodes: str) -> Listed:
    """A list of nodes."""
    return Listed("watch_nodes", at, Kind.NODES, tuple(NodeRecord(name) for name in nodes))


def test_messages_become_snapshots_metrics_and_states() -> None:
    """Every change is one new snapshot for all subscribers; counters and times follow the messages."""
    feed = ScriptedFeed()
    identity = Identity(feed, clock=lambda: 100.0, wall=lambda: 5000.0)
    told: list[Snapshot] = []
    identity.subscribe(told.append)
    identity.start()
    objects, last, errors = identity.families()
    ready_before = identity.ready
    assert (values(objects)[("nodes",)], values(last)) == (0, {})
    assert values(errors) == {("api", "unreachable"): 0, ("api", "malformed_object"): 0}

    assert not ready_before

    feed.waiting = [listed(90.0, "a", "b"), Changed("watch_nodes", 95.0, (Gone(Kind.NODES, ("", "a")),))]
    identity.poll()
    assert identity.ready
    assert told == [identity.snapshot()]
    assert (told[0].revision, told[0].taken_at, dict(told[0].nodes)) == (1, 95.0, {"b": ()})
    objects, last, _ = identity.families()
    assert (values(objects)[("nodes",)], values(last)) == (1, {("watch_nodes",): 4995.0})

    feed.waiting = [Alive("watch_nodes", 99.0), Trouble("watch_nodes", 100.0, "unreachable", "refused")]
    feed.waiting.append(Rejected("watch_nodes", 98.0, "status"))
    with structlog.testing.capture_logs() as logs:
        identity.poll()
    assert len(told) == 1
    assert [entry["event"] for entry in logs] == ["identity_trouble", "identity_object_rejected"]
    _, _, errors = identity.families()
    assert values(errors) == {("api", "unreachable"): 1, ("api", "malformed_object"): 1}
    (state,) = identity.states()
    assert (state.state, state.reason, state.detail) == (
        State.DEGRADED,
        "unreachable",
        "names are 1 s old: refused",
    )
    assert identity.describe() == tuple(family.spec for family in identity.families())
    identity.close()
    assert feed.closed == 1


def test_a_subscriber_that_fails_does_not_keep_names_from_the_others() -> None:
    """Its error is logged, and the next subscriber is told."""
    feed = ScriptedFeed()
    identity = Identity(feed)
    told: list[Snapshot] = []

    def fails(snapshot: Snapshot) -> None:
        raise ValueError(snapshot.revision)

    identity.subscribe(fails)
    identity.subscribe(told.append)
    feed.waiting = [listed(1.0, "a")]
    with structlog.testing.capture_logs() as logs:
        identity.poll()
    assert [entry["event"] for entry in logs] == ["identity_subscriber_failed"]
    assert len(told) == 1


def test_a_file_is_known_when_start_returns(tmp_path: Path) -> None:
    """Names from a file are there at once, and one row tells its state."""
    identity = Identity.open(IdentitySettings(file=DATA / "cluster.yaml"))
    identity.start()
    assert identity.ready
    assert len(identity.snapshot().services) == 9
    assert [(state.mechanism, state.state) for state in identity.states()] == [("file", State.ACTIVE)]
    objects, _, errors = identity.families()
    assert values(objects) == {("services",): 4, ("endpointslices",): 1, ("pods",): 2, ("nodes",): 1}
    assert set(values(errors)) == {
        ("file", "unreadable"),
        ("file", "malformed"),
        ("file", "malformed_object"),
    }
    identity.close()
    with pytest.raises(ManifestError):
        Identity.open(IdentitySettings(file=tmp_path / "none")).start()


def test_a_file_that_goes_bad_keeps_the_names_and_says_how_old_they_are(tmp_path: Path) -> None:
    """The last good names stay, the state is degraded with their age, and no object's name is in it."""
    path = tmp_path / "names.yaml"
    path.write_bytes((DATA / "documents.yaml").read_bytes())
    now = 100.0
    identity = Identity.open(IdentitySettings(file=path), clock=lambda: now)
    identity.start()
    before = identity.snapshot()
    path.write_bytes((DATA / "wrong_port.yaml").read_bytes())
    now = 130.0
    deadline = time.monotonic() + 20
    while identity.states()[0].state is State.ACTIVE:
        assert time.monotonic() < deadline
        identity.poll()
        time.sleep(0.002)
    assert identity.snapshot() is before
    (state,) = identity.states()
    assert (state.state, state.reason) == (State.DEGRADED, "malformed")
    assert state.detail == (
        "names are 30 s old: line 9: document 1, item 2: spec.ports[0].port: expected an integer"
    )
    assert identity.ready
    identity.close()


def test_no_names_are_a_state_too() -> None:
    """With --identity=none everything is empty, ready and off."""
    identity = Identity.open(IdentitySettings(level=Level.NONE))
    identity.start()
    identity.poll()
    assert identity.ready
    assert identity.snapshot() == Snapshot()
    assert [state.state for state in identity.states()] == [State.OFF]
    assert all(not family.samples for family in identity.families())
    identity.close()


def test_settings_that_cannot_work_are_usage_errors(tmp_path: Path) -> None:
    """A kubeconfig that is not there and a level without its node are told before anything starts."""
    with pytest.raises(UsageError, match="no kubeconfig"):
        Identity.open(IdentitySettings(kubeconfig=tmp_path / "none"))
    with pytest.raises(UsageError, match="name of this node"):
        Identity.open(IdentitySettings(level=Level.FULL))


def test_the_client_is_not_loaded_without_an_api_server() -> None:
    """Names from a file cost no memory for the Kubernetes client."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from kptrace.identity.source import Identity, IdentitySettings\n"
        "identity = Identity.open(IdentitySettings(file=Path(sys.argv[1])))\n"
        "identity.start()\n"
        "sys.exit(bool({'kubernetes', 'urllib3'} & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-c", code, DATA / "cluster.yaml"], check=True, timeout=60)
