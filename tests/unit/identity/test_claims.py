# SPDX-License-Identifier: Apache-2.0
from hypothesis import given
from hypothesis import strategies as st

from kptrace.identity.claims import Claims

steps = st.lists(st.tuples(st.booleans(), st.sampled_from("xy"), st.integers(0, 4)), max_size=60)


@given(steps)
def test_the_lowest_standing_rank_owns_each_key(history: list[tuple[bool, str, int]]) -> None:
    """After any claims and releases, the view is what a plain search among the standing claims finds."""
    claims: Claims[str, int] = Claims()
    standing: dict[str, set[int]] = {"x": set(), "y": set()}
    for claimed, key, rank in history:
        if claimed:
            claims.claim(key, (rank,), rank)
            standing[key].add(rank)
        else:
            claims.release(key, (rank,))
            standing[key].discard(rank)
        assert dict(claims.view()) == {key: min(ranks) for key, ranks in standing.items() if ranks}
    assert claims.contested == sum(len(ranks) > 1 for ranks in standing.values())


def test_a_view_stays_what_it_was() -> None:
    """Later claims change later views, and without a claim the view is the same object."""
    claims: Claims[str, int] = Claims()
    claims.claim("x", (1,), 1)
    before = claims.view()
    assert claims.view() is before
    claims.claim("y", (1,), 1)
    assert (dict(before), dict(claims.view())) == ({"x": 1}, {"x": 1, "y": 1})
