# SPDX-License-Identifier: Apache-2.0
"""Who wrote: by executable or cgroup in the watched network namespace, never by what a process calls itself."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.model.errors import UsageError
from kptrace.model.rewrite import ProcessRun
from kptrace.signals.writers import RULES, WriterRule, Writers, parse_writer

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")


def chain(*executables: str) -> list[ProcessRun]:
    """Processes by their executables, the writing one first."""
    return [ProcessRun(100 + n, executable=path) for n, path in enumerate(executables)]


def classify(
    *executables: str,
    cgroups: tuple[str, ...] = (),
    touched: tuple[str, ...] = (),
    writers: Writers | None = None,
    watched: bool = True,
) -> str:
    """The class of a chain whose n-th process has the n-th cgroup."""
    paths = dict(enumerate(cgroups, 100))
    return (writers or Writers()).classify(
        chain(*executables),
        watched_netns=watched,
        cgroup=lambda run: paths.get(run.tgid, ""),
        touched=touched,
    )


@pytest.mark.parametrize(
    ("executable", "writer"),
    [
        ("/usr/local/bin/kube-proxy", "kube-proxy"),
        ("kube-proxy-amd64", "kube-proxy"),
        ("/usr/bin/cilium-agent", "cilium-agent"),
        ("/bin/calico-node", "calico-node"),
        ("/app/aws-k8s-agent", "aws-node"),
        ("/opt/bin/flanneld", "flannel"),
        ("/node-cache", "node-local-dns"),
        ("/usr/bin/kubelet", "kubelet"),
        ("/usr/bin/dockerd", "docker"),
        ("/usr/lib/podman/netavark", "podman"),
        ("/usr/sbin/tailscaled", "tailscale"),
        ("/usr/sbin/nft", "other"),
        ("/usr/bin/python3.11", "other"),
        ("/usr/bin/not-kube-proxy", "other"),
        ("/kube-proxy/nft", "other"),
        ("", "other"),
    ],
)
def test_programs_are_known_by_the_last_part_of_their_path(executable: str, writer: str) -> None:
    """A folder's name and a part of a name tell nothing."""
    assert classify(executable) == writer


@given(st.sampled_from([rule.name for rule in RULES]), st.sampled_from(["nft", "/tmp/x", ""]))
def test_a_process_cannot_name_itself(name: str, executable: str) -> None:
    """A name that a process chose (comm) makes it nobody."""
    run = ProcessRun(5, comm=name, executable=executable)
    assert Writers().classify([run], watched_netns=True) == "other"


@given(
    st.lists(st.sampled_from(["nft", "kube-proxy", "kubelet", "k3s", "systemd"]), max_size=4),
    st.sampled_from(["", "/system.slice/kubelet.service"]),
)
def test_nobody_in_another_network_namespace_is_named(executables: list[str], path: str) -> None:
    """A pod's kube-proxy, whatever its executable and cgroup, is other."""
    assert classify(*executables, cgroups=(path,) * 4, watched=False) == "other"


def test_the_nearest_known_process_is_the_writer() -> None:
    """`nft` is nobody, its parent is; and who started that parent no longer matters."""
    assert classify("/usr/sbin/nft", "/usr/local/bin/kube-proxy", "/usr/bin/kubelet") == "kube-proxy"
    assert classify("/usr/sbin/iptables-restore", "/bin/sh", "/usr/bin/kubelet") == "kubelet"


@pytest.mark.parametrize(
    "boundary",
    [
        "/usr/bin/containerd-shim-runc-v2",
        "/usr/bin/conmon",
        "/usr/bin/runc",
        "/usr/lib/systemd/systemd",
        "/sbin/init",
    ],
)
def test_what_runs_in_a_container_was_not_written_by_its_runtime(boundary: str) -> None:
    """Behind a shim or the init process nobody is looked for: not by executable, not by cgroup."""
    assert classify("/usr/sbin/nft", boundary, "/usr/bin/containerd") == "other"
    cgroups = ("/kubepods/x", "/system.slice/containerd.service", "/system.slice/kubelet.service")
    assert classify("/usr/sbin/nft", boundary, "/usr/bin/containerd", cgroups=cgroups) == "other"


@pytest.mark.parametrize(
    ("runtime", "writer"),
    [
        ("/usr/bin/containerd", "containerd"),
        ("/usr/bin/kubelet", "kubelet"),
        ("/usr/bin/crio", "cri-o"),
        ("/usr/bin/dockerd", "docker"),
    ],
)
def test_a_runtimes_own_children_are_its(runtime: str, writer: str) -> None:
    """A CNI plugin that the runtime calls itself writes in the runtime's name."""
    assert classify("/usr/sbin/iptables", "/opt/cni/bin/portmap", runtime, "/sbin/init") == writer


def test_an_interpreted_program_is_known_by_its_unit() -> None:
    """The executable of firewalld is python; its cgroup tells, of any of the processes before a boundary."""
    unit = "/system.slice/firewalld.service"
    assert classify("/usr/bin/python3", "/usr/lib/systemd/systemd", cgroups=(unit, "/")) == "firewalld"
    assert classify("/usr/sbin/nft", "/usr/bin/python3", cgroups=("", unit)) == "firewalld"


def test_an_executable_tells_before_any_cgroup() -> None:
    """A known parent wins over the writing process's own cgroup, which is then never read."""
    asked: list[int] = []

    def cgroup(run: ProcessRun) -> str:
        asked.append(run.tgid)
        return "/system.slice/docker.service"

    writers = Writers()
    assert writers.classify(chain("nft", "kubelet"), watched_netns=True, cgroup=cgroup) == "kubelet"
    assert asked == []
    assert writers.classify(chain("nft", "sh"), watched_netns=True, cgroup=cgroup) == "docker"
    assert asked == [100]


@pytest.mark.parametrize(
    "program", ["k3s", "k3s-server", "/usr/local/bin/k3s-agent", "kubelite", "hyperkube"]
)
@pytest.mark.parametrize(
    ("touched", "writer"),
    [
        ((), "kube-proxy"),
        (("KUBE-SERVICES", "KUBE-SVC-X"), "kube-proxy"),
        (("FLANNEL-POSTRTG",), "flannel"),
        (("KUBE-NWPLCY-X",), "kube-router"),
        (("KUBE-ROUTER-INPUT", "KUBE-SERVICES"), "kube-router"),
        (("CNI-abc",), "containerd"),
        (("MY-CNI-abc",), "kube-proxy"),
    ],
)
def test_chains_tell_the_parts_of_an_all_in_one_program_apart(
    program: str, touched: tuple[str, ...], writer: str
) -> None:
    """k3s and its like are kube-proxy, unless the chains that the rewrite touched are another part's."""
    assert classify(program, touched=touched) == writer


def test_chains_tell_nothing_of_other_programs() -> None:
    """Any process can name a chain as it likes: only an all-in-one program is judged by them."""
    assert classify("/usr/local/bin/kube-proxy", touched=("FLANNEL-FWD",)) == "kube-proxy"
    assert classify("/usr/sbin/nft", touched=("FLANNEL-FWD",)) == "other"


def test_the_users_rows_win() -> None:
    """A row of the command line comes before the table's, whatever it matches by executable."""
    writers = Writers([parse_writer("edge=kube-proxy"), parse_writer("mine=/opt/*/k3s")])
    assert classify("kube-proxy", writers=writers) == "edge"
    assert classify("/opt/a/k3s", touched=("FLANNEL-FWD",), writers=writers) == "mine"
    assert classify("/usr/bin/k3s", writers=writers) == "kube-proxy"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("my-cni=my-cni-agent", WriterRule("my-cni", ("my-cni-agent",))),
        ("a.b_c-1=/opt/*/agent", WriterRule("a.b_c-1", ("/opt/*/agent",))),
        ("edge=cgroup:*/edge.service", WriterRule("edge", cgroups=("*/edge.service",))),
        ("x=a=b", WriterRule("x", ("a=b",))),
    ],
)
def test_a_users_row_is_read(text: str, rule: WriterRule) -> None:
    """The first equals sign ends the name, and `cgroup:` makes the rest a cgroup's pattern."""
    assert parse_writer(text) == rule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "=x",
        "name=",
        "name=cgroup:",
        "Name=x",
        "-a=x",
        "~other=x",
        "a b=x",
        f"{'a' * 41}=x",
        "a\n=x",
    ],
)
def test_another_form_of_row_is_refused(text: str) -> None:
    """What is no row is one error that shows the form."""
    with pytest.raises(UsageError, match="NAME=PATTERN"):
        parse_writer(text)


@given(st.text(max_size=60))
def test_any_text_is_a_row_or_an_error(text: str) -> None:
    """No text raises anything else, and what is accepted has a name that is fit for a label."""
    try:
        rule = parse_writer(text)
    except UsageError:
        return
    assert NAME.fullmatch(rule.name)
    assert len(rule.executables) + len(rule.cgroups) == 1


@given(st.lists(st.sampled_from(["other=nft", "kube-proxy=x", "a=b", "a=cgroup:c"]), max_size=5))
def test_classes_are_listed_once(rows: list[str]) -> None:
    """All classes that there can be, other too, each once, whatever the user's rows are called."""
    names = Writers(map(parse_writer, rows)).names
    assert len(set(names)) == len(names)
    assert {"other", *(rule.name for rule in RULES), *(row.split("=")[0] for row in rows)} == set(names)


@given(
    st.lists(st.text(max_size=30), max_size=6),
    st.text(max_size=40),
    st.lists(st.text(max_size=20), max_size=4),
    st.booleans(),
)
def test_no_process_makes_a_class_of_its_own(
    executables: list[str], cgroup: str, touched: list[str], watched: bool
) -> None:
    """Whatever the processes are called, the class is one of the table's: the label is bounded."""
    writers = Writers()
    found = classify(*executables, cgroups=(cgroup,) * 6, touched=tuple(touched), watched=watched)
    assert found in writers.names
