// SPDX-License-Identifier: GPL-2.0-only
/* What every program needs: holes that the loader fills, and loads that BCC must not rewrite. */
#ifndef KPTRACE_TYPES_H
#define KPTRACE_TYPES_H

/* A constant that the loader patches per instance: kernel/bytecode.py, CONSTANT_BASE. */
#define KPT_CONSTANT(variable, number) asm volatile("%0 = %1" : "=r"(variable) : "i"(0x7abc1000 + (number)))

/* The address of a one-element array's value, without a look-up: kernel/bytecode.py, VALUE_BASE. */
#define KPT_VALUE(pointer, number) asm volatile("%0 = %1 ll" : "=r"(pointer) : "i"(0x7abc2000 + (number)))

/* Direct loads through a BTF pointer: written in C, BCC would turn them into bpf_probe_read_kernel(), which a confidential
 * lockdown refuses. */
#define KPT_LOAD64(to, from, offset) asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(to) : "r"(from), "i"(offset))
#define KPT_LOAD32(to, from, offset) asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(to) : "r"(from), "i"(offset))

/* The low 32 bits of a kernel pointer as a number: kernel/bytecode.py, LOW32_MARK. */
#define KPT_LOW32(to, pointer) asm volatile("%0 = %1; %0 += 0x7abc0001" : "=r"(to) : "r"(pointer))

/* bpf_probe_read_user() by another name: at its own, BCC reads all of /proc/kallsyms to see whether the kernel has it. */
static long (*kpt_read_user)(void *to, u32 size, const void *from) = (void *)112;

#define KPT_NF_ACCEPT 1
#define KPT_F_MMAPABLE 1024

#endif
