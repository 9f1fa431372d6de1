# SPDX-License-Identifier: Apache-2.0
"""A stub header tree that lets BCC compile where no kernel headers are installed.

BCC insists on a kernel source tree, but its own prologue includes few headers of it. They can be stubs as long as a
program takes every kernel type that it touches from the running kernel's BTF (`structs.struct_definition`), which is
right on every kernel, unlike installed headers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from kptrace.kernel.structs import struct_definition
from kptrace.model.errors import UnsupportedError

__all__ = ["STRUCTS_HEADER", "struct_definition", "tree", "version_code", "write_tree"]

#: What a program includes for the structure definitions that it asked for.
STRUCTS_HEADER: Final = "kptrace/kernel_structs.h"

# Assumed where a release string has no number at all: BCC's prologue only asks "at least 4.x" of it.
_ASSUMED: Final = (5, 10, 0)

_TYPES: Final = """\
#ifndef KPTRACE_STUB_TYPES_H
#define KPTRACE_STUB_TYPES_H
typedef signed char __s8;
typedef unsigned char __u8;
typedef short __s16;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __s8 s8;
typedef __u8 u8;
typedef __s16 s16;
typedef __u16 u16;
typedef __s32 s32;
typedef __u32 u32;
typedef __s64 s64;
typedef __u64 u64;
typedef __u16 __le16;
typedef __u16 __be16;
typedef __u32 __le32;
typedef __u32 __be32;
typedef __u64 __le64;
typedef __u64 __be64;
typedef __u16 __sum16;
typedef __u32 __wsum;
typedef _Bool bool;
typedef unsigned long size_t;
typedef long ssize_t;
typedef unsigned long uintptr_t;
typedef int pid_t;
enum { false = 0, true = 1 };
#define NULL ((void *)0)
#define __bitwise
#define __inline inline
#define __always_inline inline __attribute__((always_inline))
#define __aligned_u64 __u64 __attribute__((aligned(8)))
"""

# As a program sees them: arch/x86/include/asm/ptrace.h and arch/arm64/include/asm/ptrace.h. Not from BTF, since BCC's
# PT_REGS_* macros fix the names and the layout is part of what user space is promised.
_PT_REGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "x86_64": """\
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx;
	unsigned long r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long orig_ax, ip, cs, flags, sp, ss;
};
""",
        "aarch64": """\
struct user_pt_regs {
	__u64 regs[31];
	__u64 sp, pc, pstate;
};
struct pt_regs {
	union {
		struct user_pt_regs user_regs;
		struct {
			__u64 regs[31];
			__u64 sp, pc, pstate;
		};
	};
	__u64 orig_x0;
	__s32 syscallno;
	__u32 unused2;
};
""",
    }
)

# Included by BCC 0.26 to 0.31 before or around the program's own text; all they need is there with the types.
_EMPTY: Final = (
    "linux/bpf_common.h",
    "linux/log2.h",
    "uapi/linux/bpf.h",
    "uapi/linux/if_ether.h",
    "uapi/linux/if_packet.h",
    "uapi/linux/ptrace.h",
)


def version_code(release: str) -> int:
    """LINUX_VERSION_CODE of a release such as `6.1.0-28-amd64`, `6.8-rc4+` or `4.14.355-275.572.amzn2.x86_64`."""
    match = re.search(r"(?<!\d)(\d{1,3})\.(\d{1,3})(?:\.(\d{1,5}))?(?!\d)", release, re.ASCII)
    major, minor, patch = (int(part or 0) for part in match.groups()) if match else _ASSUMED
    # As in the kernel's own Makefile: a patch level beyond 255 must not spill into the minor version.
    return (major << 16) + (min(minor, 255) << 8) + min(patch, 255)


def tree(*, machine: str, release: str, page_size: int, structs: str = "") -> dict[str, str]:
    """The stub tree as relative path to text.

    Args:
        machine: as `uname -m` says.
        release: as `uname -r` says.
        page_size: in bytes.
        structs: C definitions for `STRUCTS_HEADER`, such as `struct_definition` makes.

    Raises:
        UnsupportedError: the machine's registers are not known.
    """
    if machine not in _PT_REGS:
        raise UnsupportedError(
            f"no register layout for {machine}", remedy=f"run on {' or '.join(sorted(_PT_REGS))}"
        )
    files = {
        "linux/types.h": f"{_TYPES}{_PT_REGS[machine]}#endif\n",
        "linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n#define CONFIG_ARCH_HAS_SYSCALL_WRAPPER 1\n",
        "linux/version.h": (
            f"#define LINUX_VERSION_CODE {version_code(release)}\n"
            "#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))\n"
        ),
        "asm/page.h": f"#define PAGE_SIZE {page_size}\n",
        STRUCTS_HEADER: f"#pragma once\n#include <linux/types.h>\n{structs}",
        **dict.fromkeys(_EMPTY, "#include <linux/types.h>\n"),
    }
    return {f"include/{name}": text for name, text in files.items()}


def write_tree(root: Path, *, machine: str, release: str, page_size: int, structs: str = "") -> Path:
    """Write the tree below `root` and return the folder for BCC_KERNEL_SOURCE; see `tree` for the arguments."""
    for name, text in tree(machine=machine, release=release, page_size=page_size, structs=structs).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root
