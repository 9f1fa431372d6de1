# SPDX-License-Identifier: Apache-2.0
"""What memory the kernel says that a map takes."""

import re
from pathlib import Path
from typing import Final

_MEMORY: Final = re.compile(r"^memlock:\s*(\d+)$", re.MULTILINE)


def map_memory(fd: int, own: Path = Path("/proc/self")) -> int | None:
    """Bytes; None if it does not say.

    Before v6.4 that is what the map would take if it were full, and not what is allocated.

    Args:
        fd: of the map, in this process.
        own: folder of this process in procfs.

    Raises:
        OSError: procfs does not let it be read.
    """
    found = _MEMORY.search((own / "fdinfo" / str(fd)).read_text(encoding="ascii"))
    return int(found[1]) if found else None
