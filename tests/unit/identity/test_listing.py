# SPDX-License-Identifier: Apache-2.0
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kptrace.identity.api import ApiError
from kptrace.identity.listing import ListReader

# What looks like the border between two objects, within one: in strings, and as nested objects.
tricky = st.sampled_from(['},{"metadata":{', '"items":[', "]}", "\\", "é"])
values = st.recursive(
    st.integers() | st.text(max_size=4) | tricky,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["metadata", "items", "kind", "a"]), inner, max_size=3)
    ),
    max_leaves=10,
)
objects = st.fixed_dictionaries(
    {"metadata": st.fixed_dictionaries({"name": st.text(max_size=3)}), "spec": values}
)


@given(
    items=st.lists(objects, max_size=5), cuts=st.lists(st.integers(0, 400), max_size=6), spaces=st.booleans()
)
def test_a_list_is_read_in_any_pieces(items: list[Any], cuts: list[int], spaces: bool) -> None:
    """Whatever the objects hold and wherever the body is cut, the same objects come in the same order."""
    separators = (", ", ": ") if spaces else (",", ":")
    metadata = {"resourceVersion": "7", "continue": "more"}
    body = json.dumps({"kind": "List", "metadata": metadata, "items": items}, separators=separators).encode()
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    reader = ListReader([body[low:high] for low, high in itertools.pairwise(edges)], "/path")
    assert [json.loads(bytes(item)) for item in reader.items()] == items
    assert (reader.version, reader.more) == ("7", "more")


@pytest.mark.parametrize("body", ['{"metadata":{},"items":null}', '{"metadata":{}}', "{}"])
def test_nothing_is_a_list_too(body: str) -> None:
    """Go writes null for no objects; a list without a version is as old as can be."""
    reader = ListReader([body.encode()], "/path")
    assert list(reader.items()) == []
    assert (reader.version, reader.more) == ("0", "")


def test_the_metadata_may_come_last() -> None:
    """Whatever the order of its fields, a list is read."""
    reader = ListReader(
        [b'{"items":[{"metadata":{}},{"metadata":{}}],"metadata":{"resourceVersion":"9"}}'], "/path"
    )
    assert len(list(reader.items())) == 2
    assert reader.version == "9"


@pytest.mark.parametrize("body", ["<html>", '{"items":[{"metadata":{}},{"metadata":{', '{"items":7}', ""])
def test_what_is_no_list_is_refused(body: str) -> None:
    """A body that ends too early, or never was a list, is an error."""
    with pytest.raises(ApiError) as refused:
        list(ListReader([body.encode()], "/path").items())
    assert refused.value.reason == "malformed_stream"
