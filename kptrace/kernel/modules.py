# SPDX-License-Identifier: Apache-2.0
"""Which kernel modules are there, and their BTF: cheap enough to ask every second."""

from kptrace.kernel.host import Host


def loaded_module(host: Host, name: str) -> int | None:
    """A number for a loaded module: another one after it was unloaded and loaded again. None where it is not there.

    What is built in has no `initstate`, and a module that is coming or going is not `live`.
    """
    folder = host.sys / "module" / name
    try:
        if (folder / "initstate").read_text().strip() != "live":
            return None
        return folder.stat().st_ino
    except OSError:
        return None
