# SPDX-License-Identifier: Apache-2.0
"""Who wrote: the class of program behind a rewrite, by executable or cgroup in the host's network namespace. Pure.

Any process can call itself anything, so its name (comm) is never looked at, and a program in another network namespace
than the watched one is never named, whatever its executable: kube-proxy has a mount namespace of its own, but the
node's network.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final

from kptrace.model.errors import UsageError
from kptrace.model.rewrite import ProcessRun

OTHER: Final = "other"
KUBE_PROXY: Final = "kube-proxy"
_CGROUP_PREFIX: Final = "cgroup:"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")


@dataclass(frozen=True, slots=True)
class WriterRule:
    """One row of the table: a process is of this class if its executable or its cgroup matches one of the patterns.

    Attributes:
        name: the class, a label value.
        executables: shell patterns for the executable's last part, or for its whole path where they hold a slash.
        cgroups: shell patterns for the cgroup's path.
    """

    name: str
    executables: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()


#: Programs that do several classes' work in one process are kube-proxy unless the chains say otherwise.
_ALL_IN_ONE: Final = ("k3s", "k3s-server", "k3s-agent", "kubelite", "hyperkube")

RULES: Final = (
    WriterRule(KUBE_PROXY, (KUBE_PROXY, "kube-proxy-*", *_ALL_IN_ONE)),
    WriterRule("cilium-agent", ("cilium-agent",)),
    WriterRule("calico-node", ("calico-node", "calico-felix", "felix")),
    WriterRule("aws-node", ("aws-k8s-agent", "aws-node", "aws-vpc-cni", "aws-vpc-cni-init")),
    WriterRule("flannel", ("flanneld", "flannel")),
    WriterRule("kube-router", ("kube-router",)),
    WriterRule("antrea", ("antrea-agent", "antrea-cni")),
    WriterRule("ovn-kubernetes", ("ovnkube", "ovnkube-node")),
    WriterRule("weave", ("weaver", "weave-npc")),
    WriterRule("node-local-dns", ("node-cache",)),
    WriterRule("kubelet", ("kubelet",), ("*/kubelet.service",)),
    WriterRule("containerd", ("containerd",), ("*/containerd.service",)),
    WriterRule("cri-o", ("crio",), ("*/crio.service",)),
    WriterRule("docker", ("dockerd",), ("*/docker.service",)),
    WriterRule("podman", ("podman", "netavark")),
    WriterRule("firewalld", ("firewalld",), ("*/firewalld.service",)),
    WriterRule("ufw", ("ufw", "ufw-init"), ("*/ufw.service",)),
    WriterRule("fail2ban", ("fail2ban-server",), ("*/fail2ban.service",)),
    WriterRule("libvirt", ("libvirtd", "virtnetworkd")),
    WriterRule("tailscale", ("tailscaled",)),
)

#: A process above these belongs to somebody else: what runs in a container was not written by the runtime.
_BOUNDARIES: Final = ("containerd-shim*", "conmon", "conmonrs", "runc", "crun", "systemd", "init")
#: Chains by which the parts of an all-in-one program are told apart.
_CHAIN_OWNERS: Final = (
    ("FLANNEL-", "flannel"),
    ("KUBE-ROUTER-", "kube-router"),
    ("KUBE-POD-FW-", "kube-router"),
    ("KUBE-NWPLCY-", "kube-router"),
    ("CNI-", "containerd"),
)


def parse_writer(text: str) -> WriterRule:
    """A `--writer NAME=PATTERN` value; the pattern is one of an executable, or with `cgroup:` before it of a cgroup.

    Raises:
        UsageError: it is not of that form.
    """
    name, separator, pattern = text.partition("=")
    if not separator or not pattern.removeprefix(_CGROUP_PREFIX) or not _NAME.fullmatch(name):
        raise UsageError(
            f"--writer {text!r} is not NAME=PATTERN with a name of small letters, digits and hyphens",
            remedy="for example --writer my-cni=my-cni-agent, or --writer edge=cgroup:*/edge.service",
        )
    if pattern.startswith(_CGROUP_PREFIX):
        return WriterRule(name, cgroups=(pattern.removeprefix(_CGROUP_PREFIX),))
    return WriterRule(name, executables=(pattern,))


class Writers:
    """The table with the user's rows before its own."""

    def __init__(self, extra: Iterable[WriterRule] = ()) -> None:
        """`extra` rows win over the table's."""
        self._rules = (*extra, *RULES)

    @property
    def names(self) -> tuple[str, ...]:
        """All classes that there can be."""
        return tuple(dict.fromkeys((*(rule.name for rule in self._rules), OTHER)))

    def classify(
        self,
        chain: Sequence[ProcessRun],
        *,
        watched_netns: bool,
        cgroup: Callable[[ProcessRun], str] = lambda _: "",
        touched: Iterable[str] = (),
    ) -> str:
        """The class of the nearest process of a chain that has one.

        Args:
            chain: the writing process and its ancestors, nearest first: `nft` is nobody, its parent is.
            watched_netns: whether the writing thread is in the watched network namespace.
            cgroup: the path of a process's cgroup, asked for only where executables do not tell.
            touched: names of the chains that the rewrite touched, as far as known.
        """
        if not watched_netns:
            return OTHER
        inside: list[ProcessRun] = []
        for run in chain:
            if rule := self._by_executable(run.executable):
                shared = rule.name == KUBE_PROXY and _basename(run.executable) in _ALL_IN_ONE
                return _by_chains(touched) if shared else rule.name
            if any(fnmatchcase(_basename(run.executable), pattern) for pattern in _BOUNDARIES):
                break
            inside.append(run)
        for run in inside:
            if (path := cgroup(run)) and (rule := self._by_cgroup(path)):
                return rule.name
        return OTHER

    def _by_executable(self, path: str) -> WriterRule | None:
        name = _basename(path)
        return next(
            (
                rule
                for rule in self._rules
                for pattern in rule.executables
                if fnmatchcase(path if "/" in pattern else name, pattern)
            ),
            None,
        )

    def _by_cgroup(self, path: str) -> WriterRule | None:
        return next(
            (rule for rule in self._rules for pattern in rule.cgroups if fnmatchcase(path, pattern)), None
        )


def _basename(path: str) -> str:
    return PurePosixPath(path).name


def _by_chains(touched: Iterable[str]) -> str:
    for chain in touched:
        for prefix, owner in _CHAIN_OWNERS:
            if chain.startswith(prefix):
                return owner
    return KUBE_PROXY
