# SPDX-License-Identifier: Apache-2.0
"""The compile child: `python -m kptrace.kernel.compile_child BTF`, a line of JSON a question, and one an answer.

The only importer of bcc. It makes the maps that BCC insists on, compiles, takes the bytecode out, and exits at the end
of its input: nothing that it made outlives it.
"""

import ctypes
import json
import os
import platform
import struct
import sys
import tempfile
from base64 import b64encode
from pathlib import Path
from typing import Any

from kptrace.kernel.btf import Btf
from kptrace.kernel.headers import write_tree
from kptrace.kernel.memlock import raise_memlock

_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1


class LackingError(Exception):
    """The kernel's BTF has no such thing; the argument is the fact."""


def resolve(btf: Btf, fact: str) -> int | None:
    """One fact of a request (see `compile.Request`); None where it is optional and absent.

    Raises:
        LackingError: the fact is not optional, and absent.
    """
    optional = fact.startswith("?")
    kind, *names = fact.removeprefix("?").split(":")
    try:
        match kind, names:
            case "offset", [struct_name, member]:
                return btf.member_offset(struct_name, member)
            case "struct", [name]:
                return btf.struct_id(name)
            case "func", [name]:
                return btf.func_id(name)
            case "enum", [name]:
                return btf.enum_value(name)
    except LookupError:
        if optional:
            return None
        raise LackingError(fact) from None
    raise ValueError(f"unknown fact {fact!r}")


def compile_one(request: dict[str, Any], btf: Btf) -> dict[str, Any]:
    """Compile the request and describe what came out."""
    values = {name: resolve(btf, fact) for name, fact in request["facts"].items()}
    from bcc import BPF, lib  # noqa: PLC0415  (importing it maps LLVM, which a failed BTF look-up need not pay)

    known = {name: value for name, value in values.items() if value is not None}
    flags = [f"-D{name}={value}" for name, value in {**known, **request["defines"]}.items()]
    # BCC hands the source to clang as a virtual main file, so its own folder is no include path.
    program = BPF(
        text=request["text"].encode(), cflags=[f"-I{request['include']}", "-Wno-unused-function", *flags]
    )
    module = program.module
    # bcc's own binding does not declare this one.
    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    maps, by_fd = [], {}
    for index in range(lib.bpf_num_tables(module)):
        name = lib.bpf_table_name(module, index).decode()
        by_fd[lib.bpf_table_fd_id(module, index)] = name
        maps.append(
            {
                "name": name,
                "type": lib.bpf_table_type_id(module, index),
                "key_size": lib.bpf_table_key_size_id(module, index),
                "value_size": lib.bpf_table_leaf_size_id(module, index),
                "max_entries": lib.bpf_table_max_entries_id(module, index),
                "flags": lib.bpf_table_flags_id(module, index),
            }
        )
    functions = {}
    for index in range(lib.bpf_num_functions(module)):
        name = lib.bpf_function_name(module, index).decode()
        functions[name] = relocatable(program.dump_func(name.encode()), by_fd)
    return {"functions": functions, "maps": maps, "values": known}


def relocatable(code: bytes, map_names: dict[int, str]) -> dict[str, Any]:
    """Replace the child's map descriptors by names, which mean something to the parent."""
    maps: dict[int, str] = {}
    out = bytearray(code)
    for at in range(0, len(out), 8):
        op, regs, off, imm = struct.unpack_from("<BBhi", out, at)
        if op == _LD_IMM64 and regs >> 4 == _PSEUDO_MAP_FD:
            maps[at // 8] = map_names[imm]
            struct.pack_into("<BBhi", out, at, op, regs, off, 0)
    return {"code": b64encode(bytes(out)).decode(), "maps": maps}


def main() -> None:
    """Answer questions until there are no more."""
    if trouble := raise_memlock():
        sys.stderr.write(f"{trouble}\n")
    with tempfile.TemporaryDirectory(prefix="kptrace-headers-") as folder:
        tree = write_tree(
            Path(folder),
            machine=platform.machine(),
            release=platform.release(),
            page_size=os.sysconf("SC_PAGE_SIZE"),
        )
        os.environ["BCC_KERNEL_SOURCE"] = str(tree)
        btf = Btf.load(Path(sys.argv[1]))
        for line in sys.stdin:
            try:
                answer = compile_one(json.loads(line), btf)
            except LackingError as error:
                answer = {"lacking": error.args[0]}
            sys.stdout.write(f"{json.dumps(answer)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
