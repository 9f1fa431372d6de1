# SPDX-License-Identifier: Apache-2.0
"""The stub header tree, with the BCC that is installed."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from kptrace.kernel.btf import Btf
from kptrace.kernel.headers import STRUCTS_HEADER, struct_definition, write_tree

VMLINUX = Path("/sys/kernel/btf/vmlinux")
# Compiles and dumps the bytecode only: nothing is loaded, so it works where kprobes do not.
_CHILD = """
import json, struct, sys
from bcc import BPF
code = BPF(text=sys.stdin.read()).dump_func("probe")
print(json.dumps([struct.unpack_from("<BBhi", code, at)[3] for at in range(0, len(code), 8)]))
"""
_PROGRAM = f"""
#include <uapi/linux/ptrace.h>
#include <{STRUCTS_HEADER}>
BPF_HASH(counts, u64, u64);
BPF_RINGBUF_OUTPUT(events, 8);
_Static_assert(sizeof(struct sk_buff) == KPT_SKB_SIZE, "size");
_Static_assert(sizeof(struct nf_conn) == KPT_CONN_SIZE, "size");
int probe(struct pt_regs *ctx) {{
    struct sk_buff *skb = (struct sk_buff *)PT_REGS_PARM1(ctx);
    u64 key = skb->len + skb->dev->ifindex, one = 1;
    counts.increment(key);
    return KPT_MARK + LINUX_VERSION_CODE - LINUX_VERSION_CODE;
}}
"""


@pytest.fixture(scope="module")
def btf() -> Btf:
    """The running kernel's BTF."""
    if importlib.util.find_spec("bcc") is None or not VMLINUX.exists():
        pytest.skip("needs BCC and the kernel's BTF")
    return Btf.load(VMLINUX)


def test_bcc_compiles_against_the_tree(btf: Btf, tmp_path: Path) -> None:
    """Maps, registers and structures of the running kernel compile with no kernel headers, offsets as in BTF."""
    structs = "".join(
        struct_definition(btf, name) for name in ("sk_buff", "net_device", "nf_conn", "nf_hook_state")
    )
    tree = write_tree(
        tmp_path,
        machine=platform.machine(),
        release=platform.release(),
        page_size=os.sysconf("SC_PAGE_SIZE"),
        structs=structs,
    )
    sizes = {
        "KPT_SKB_SIZE": btf.size_of(btf.struct_id("sk_buff")),
        "KPT_CONN_SIZE": btf.size_of(btf.struct_id("nf_conn")),
        "KPT_MARK": 424242,
    }
    text = "".join(f"#define {name} {value}\n" for name, value in sizes.items()) + _PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=text,
        env={**os.environ, "BCC_KERNEL_SOURCE": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    immediates = json.loads(done.stdout)
    assert 424242 in immediates
    assert btf.member_offset("sk_buff", "len") in immediates
    assert btf.member_offset("net_device", "ifindex") in immediates
