# SPDX-License-Identifier: Apache-2.0
"""Which of the functions are there, in the kernel or in a module, and what their BTF says of them."""

import os
from collections.abc import Iterable, Mapping

from kptrace.kernel.btf import Btf, BtfError, BtfMissing
from kptrace.kernel.host import Host
from kptrace.kernel.modules import loaded_module
from kptrace.kernel.registers import Registers, registers
from kptrace.model.errors import KptraceError
from kptrace.signals.lookup_function_kernel import Mechanism, Target
from kptrace.signals.lookup_function_layout import Function, holes

#: A function that can be attached to, or why not.
Found = Target | KptraceError


def present(host: Host, functions: Iterable[Function]) -> dict[Function, int]:
    """The functions whose modules are loaded, each with the module's number. Cheap: one small file for each."""
    numbers = {function: loaded_module(host, function.module) for function in functions}
    return {function: number for function, number in numbers.items() if number is not None}


def find_targets(host: Host, mechanism: Mechanism, modules: Mapping[Function, int]) -> dict[Function, Found]:
    """Read the BTF for functions that are to be attached to: a tenth of a second, in which it needs 30 MB.

    Args:
        host: where the BTF is.
        mechanism: how they are to be attached to.
        modules: the functions, each with its module's number, or 0 for one that may be built in.

    Returns:
        An answer for each function but those that are not built in.
    """
    try:
        layout = registers(os.uname().machine) if mechanism == "kprobe" else None
        kernel = Btf.load(host.vmlinux_btf)
    except KptraceError as error:
        return dict.fromkeys(modules, error)
    found: dict[Function, Found] = {}
    for function, module in modules.items():
        if not module and not _has(kernel, function):
            continue
        try:
            found[function] = _target(host, kernel, function, module, layout)
        except BtfError as error:
            found[function] = error
    return found


def _target(host: Host, kernel: Btf, function: Function, module: int, layout: Registers | None) -> Target:
    path = host.module_btf(function.module)
    # Before Linux kernel commit 36e68442d1af ("bpf: Load and verify kernel module BTFs") (in v5.11) modules have none.
    btf = Btf.load(path, kernel) if module and path.exists() else kernel
    filled = holes(btf, function, layout)
    # A kprobe finds its function by name.
    btf_id = 0 if layout else btf.func_id(function.name)
    return Target(function, filled, btf_id, module)


def _has(kernel: Btf, function: Function) -> bool:
    try:
        return bool(kernel.func_id(function.name))
    except BtfMissing:
        return False
