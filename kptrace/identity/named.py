# SPDX-License-Identifier: Apache-2.0
"""How an object is called."""

import sys

from kptrace.identity import wire
from kptrace.identity.fields import ObjectError
from kptrace.identity.records import Name


def name_of(found: wire.Named) -> Name:
    """Namespace (empty where there is none) and name.

    Raises:
        ObjectError: it has no name.
    """
    metadata = metadata_of(found)
    return sys.intern(metadata.namespace or ""), metadata.name or ""


def metadata_of(found: wire.Named) -> wire.Metadata:
    """The metadata of an object, with its name.

    Raises:
        ObjectError: it has none.
    """
    if found.metadata is None:
        raise ObjectError("metadata", "a mapping", None)
    if not found.metadata.name:
        raise ObjectError("metadata.name", "a name", found.metadata.name)
    return found.metadata
