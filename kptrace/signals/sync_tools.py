# SPDX-License-Identifier: Apache-2.0
"""What a process that is nft or one of the iptables does, by its command line. Pure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from pathlib import PurePosixPath
from typing import Final


class Kind(StrEnum):
    """Which tools belong together: a run uses those of one kind."""

    NFT = "nft"
    IPTABLES = "iptables"


class Role(Enum):
    """What it does to the installed rules.

    WRITE hands over many changes (`nft -f`, `iptables-restore`), CHANGE and REMOVE one (`iptables -I`, `-D`), TABLE those
    of one named table (`iptables-restore -T nat`); LIST reads all (`nft list`, `iptables-save`), CHECK one rule or chain
    (`iptables -C`, `-S`); DRY only tries; NONE does nothing of interest; UNKNOWN may be anything: its command line is not
    known.
    """

    LIST = auto()
    CHECK = auto()
    CHANGE = auto()
    REMOVE = auto()
    WRITE = auto()
    TABLE = auto()
    DRY = auto()
    NONE = auto()
    CONNTRACK = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Tool:
    """A process's job.

    Attributes:
        kind: nft or iptables.
        role: what it does.
        family: `ipv4`, `ipv6` or `inet`, empty where the command line does not tell.
        json: whether nft is asked for JSON, as programs do and people do not.
        canary: whether it is about a chain that is there only to be missed.
    """

    kind: Kind
    role: Role
    family: str = ""
    json: bool = False
    canary: bool = False


_IPTABLES: Final = re.compile(r"ip(6?)tables(-legacy|-nft)?(-r[estor]*|-s[ave]*)?")
_MULTI: Final = re.compile(r"xtables(-legacy|-nft)?-multi")
_FAMILIES: Final = {"ip": "ipv4", "ip6": "ipv6", "inet": "inet"}
#: Options of nft with a value of their own, those without an effect, and words that say what is done.
_NFT_VALUES: Final = frozenset({"-I", "--includepath", "-D", "--define"})
_NFT_READS: Final = frozenset({"list", "get"})
_NFT_NOTHING: Final = frozenset({"-v", "-V", "--version", "-h", "--help", "monitor", "describe"})
_COMMANDS: Final = {
    "-A": Role.CHANGE, "--append": Role.CHANGE, "-I": Role.CHANGE, "--insert": Role.CHANGE,
    "-N": Role.CHANGE, "--new-chain": Role.CHANGE, "-R": Role.CHANGE, "--replace": Role.CHANGE,
    "-P": Role.CHANGE, "--policy": Role.CHANGE, "-E": Role.CHANGE, "--rename-chain": Role.CHANGE,
    "-Z": Role.CHANGE, "--zero": Role.CHANGE,
    "-D": Role.REMOVE, "--delete": Role.REMOVE, "-F": Role.REMOVE, "--flush": Role.REMOVE,
    "-X": Role.REMOVE, "--delete-chain": Role.REMOVE,
    "-C": Role.CHECK, "--check": Role.CHECK,
    "-S": Role.CHECK, "--list-rules": Role.CHECK, "-L": Role.CHECK, "--list": Role.CHECK,
    "-V": Role.NONE, "--version": Role.NONE, "-h": Role.NONE, "--help": Role.NONE,
}  # fmt: skip


def find_tool(executable: str, comm: str = "", arguments: Sequence[str] | None = None) -> Tool | None:
    """The job of a process; None if it is no tool that reads or writes rules, or one that people type into.

    Args:
        executable: its path.
        comm: its name, of 15 characters: tells the applet of an executable that has several.
        arguments: argv, None or empty if unknown.
    """
    name = PurePosixPath(executable).name
    words = _words(arguments or ())
    if _MULTI.fullmatch(name):
        first = PurePosixPath(words[0]).name if words else comm
        if _MULTI.fullmatch(first) and len(words) > 1:
            first, words = words[1], words[1:]
        name = first
    # A script of that name: its interpreter comes first.
    start = next((n for n, word in enumerate(words[:4]) if PurePosixPath(word).name == name), 0)
    words = words[start:]
    if name == "nft":
        return _nft(words[1:])
    if name == "conntrack":
        return Tool(Kind.IPTABLES, Role.CONNTRACK)
    if match := _IPTABLES.fullmatch(name):
        return _iptables(match, words[1:])
    return None


def _words(arguments: Iterable[str]) -> list[str]:
    # nft takes its command as one argument as well as in several.
    return [word for argument in arguments for word in (argument.split() or [""])]


def _nft(words: Sequence[str]) -> Tool | None:
    if not words:
        return Tool(Kind.NFT, Role.UNKNOWN)
    letters = "".join(word[1:] for word in words if re.fullmatch(r"-[a-zA-Z]+", word))
    json = "j" in letters or "--json" in words
    if "i" in letters or "--interactive" in words:
        return None
    if "c" in letters or "--check" in words:
        return Tool(Kind.NFT, Role.DRY, json=json)
    command = _nft_command(words)
    if command in _NFT_READS:
        behind = words[words.index(command) + 1 :]
        family = next((_FAMILIES[word] for word in behind[1:2] if word in _FAMILIES), "")
        return Tool(Kind.NFT, Role.LIST, family, json)
    if command in _NFT_NOTHING:
        return Tool(Kind.NFT, Role.NONE)
    return Tool(Kind.NFT, Role.WRITE, json=json)


def _nft_command(words: Sequence[str]) -> str:
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in _NFT_VALUES:
            skip = True
        elif word in _NFT_NOTHING or not word.startswith("-"):
            return word
    return ""


def _iptables(name: re.Match[str], words: Sequence[str]) -> Tool:
    family = "ipv6" if name[1] else "ipv4"
    canary = any(word.endswith("-CANARY") for word in words)
    if name[3] and name[3].startswith("-s"):
        role = Role.LIST
    elif name[3]:
        role = _restore(words)
    else:
        unknown = Role.NONE if words else Role.UNKNOWN
        role = next((_COMMANDS[word] for word in words if word in _COMMANDS), unknown)
    return Tool(Kind.IPTABLES, role, family, canary=canary)


def _restore(words: Sequence[str]) -> Role:
    if "--test" in words or "-t" in words:
        return Role.DRY
    if any(word in ("-T", "--table") or word.startswith("--table=") for word in words):
        return Role.TABLE
    return Role.NONE if "-V" in words or "--version" in words else Role.WRITE
