# SPDX-License-Identifier: Apache-2.0
"""Addresses that several objects may claim, each given to one of them by a rule that knows no order of arrival."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Claims(Generic[K, V]):
    """Who owns what: of all claims the one with the lowest rank.

    Nearly all keys have one claim; only the others cost more than two dictionary entries. A claim is its rank and its
    value together, and ranks of one key never tie between different values (the value is part of the rank).
    """

    def __init__(self) -> None:
        self._values: dict[K, V] = {}
        self._ranks: dict[K, tuple[Any, ...]] = {}
        self._losers: dict[K, dict[tuple[Any, ...], V]] = {}
        self._view: Mapping[K, V] | None = None

    def claim(self, key: K, rank: tuple[Any, ...], value: V) -> None:
        """Add a claim. The same claim twice is one."""
        present = self._ranks.get(key)
        if present is None:
            self._win(key, rank, value)
        elif rank < present:
            self._losers.setdefault(key, {})[present] = self._values[key]
            self._win(key, rank, value)
        elif rank != present:
            self._losers.setdefault(key, {})[rank] = value

    def release(self, key: K, rank: tuple[Any, ...]) -> None:
        """Take a claim back; the next one wins. A claim that is not there is no error."""
        losers = self._losers.get(key)
        if self._ranks.get(key) != rank:
            if losers:
                losers.pop(rank, None)
        elif losers:
            best = min(losers)
            self._win(key, best, losers.pop(best))
        else:
            del self._ranks[key], self._values[key]
            self._view = None
        if losers is not None and not losers:
            del self._losers[key]

    @property
    def contested(self) -> int:
        """How many keys have more than one claim."""
        return len(self._losers)

    def view(self) -> Mapping[K, V]:
        """What belongs to whom now: the same object as long as nothing changes, and never changed itself."""
        if self._view is None:
            self._view = MappingProxyType(self._values.copy())
        return self._view

    def _win(self, key: K, rank: tuple[Any, ...], value: V) -> None:
        self._values[key] = value
        self._ranks[key] = rank
        self._view = None
