# SPDX-License-Identifier: Apache-2.0
"""What the C compiler makes of the headers that the programs in the kernel share with Python."""

import re
import subprocess
from pathlib import Path

BPF = Path(__file__).parents[2] / "bpf"

_TYPES = """\
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
typedef int s32; typedef long long s64;
int printf(const char *, ...);
int putchar(int);
#define show(name, value) printf(name " %lld\\n", (long long)(value))
#define dump(object) for (unsigned long i_ = 0; i_ < sizeof(object); i_++) putchar(((unsigned char *)&(object))[i_])
"""
_NUMBER = re.compile(r"^#define \w+ \d+\b", re.MULTILINE)


def run(folder: Path, header: str, body: str) -> bytes:
    """Compile a `main` with this body against a header in bpf/include, warnings being errors; return what it prints.

    The body may `show` a number by a name, and `dump` an object's bytes. Of other headers that the header includes only
    the numbers are there: their functions are for the kernel.
    """
    include = folder / "include/kptrace"
    include.mkdir(parents=True, exist_ok=True)
    for other in (BPF / "include/kptrace").glob("*.h"):
        text = other.read_text()
        alone = other.name == Path(header).name
        (include / other.name).write_text(text if alone else "\n".join(_NUMBER.findall(text)) + "\n")
    source = folder / "main.c"
    source.write_text(f"{_TYPES}#include <{header}>\nint main(void)\n{{\n{body}\nreturn 0;\n}}\n")
    program = folder / "main"
    command: list[str | Path] = [
        "gcc",
        "-std=gnu11",
        "-Wall",
        "-Werror",
        f"-I{folder / 'include'}",
        "-o",
        program,
        source,
    ]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([program], check=True, capture_output=True).stdout


def numbers(folder: Path, header: str, *expressions: str) -> dict[str, int]:
    """The values of constant expressions, by their text."""
    shown = run(folder, header, "\n".join(f'show("{text}", {text});' for text in expressions)).decode()
    pairs = (line.rsplit(" ", 1) for line in shown.splitlines())
    return {text: int(value) for text, value in pairs}
