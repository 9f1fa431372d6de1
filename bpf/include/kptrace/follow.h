// SPDX-License-Identifier: GPL-2.0-only
/* Loads at offsets that only the loader knows: the function's module may come long after the compiler is gone.
 *
 * KPT_FIELD loads from the program's context, whose layout differs by machine and by the order of arguments.
 * KPT_READ follows a pointer to a structure that the verifier knows in a tracing program; a kprobe's is a mere number.
 * KPT_WORD loads 8 bytes from any address: a structure that the verifier does not know, or the inside of one.
 */
#ifndef KPTRACE_FOLLOW_H
#define KPTRACE_FOLLOW_H

#include <kptrace/types.h>

#define STRING_WORDS 8

/* kernel/bytecode.py, FIELD_BASE */
#define KPT_FIELD(width, to, from, number) \
	asm volatile("%0 = *(" #width " *)(%1 + %2)" : "=r"(to) : "r"(from), "i"(0x7a00 + (number)))

/* A pointer that is null or stale reads as 0 in each of these. */
#define KPT_PROBE(width, to, address)                                              \
	do {                                                                       \
		width value_ = 0;                                                  \
		bpf_probe_read_kernel(&value_, sizeof(value_), (void *)(address)); \
		(to) = value_;                                                     \
	} while (0)

#define KPT_PROBE_FIELD(width, to, from, number)             \
	do {                                                 \
		u64 offset_;                                 \
		KPT_CONSTANT(offset_, number);               \
		KPT_PROBE(width, to, (u64)(from) + offset_); \
	} while (0)

#ifdef KPT_TYPED
#define KPT_READ KPT_FIELD
#else
#define KPT_READ KPT_PROBE_FIELD
#endif

#if defined(KPT_TYPED) && defined(KPT_KFUNC_RDONLY_CAST)
static void *(*rdonly_cast)(u64 pointer, u32 type) = (void *)0x7fff0001; /* kfunc 0 */

/* struct pt_regs begins with 16 words on every machine: a view of any memory as words, at no cost. */
#define KPT_AT(to, address)                                                    \
	do {                                                                   \
		u64 cast_ = (u64)rdonly_cast((u64)(address), KPT_PT_REGS);     \
		asm volatile("%0 = *(u64 *)(%1 + 0)" : "=r"(to) : "r"(cast_)); \
	} while (0)
#else
#define KPT_AT(to, address) KPT_PROBE(u64, to, address)
#endif

#define KPT_WORD(to, from, number)                 \
	do {                                       \
		u64 offset_;                       \
		KPT_CONSTANT(offset_, number);     \
		KPT_AT(to, (u64)(from) + offset_); \
	} while (0)

/* Copies a string of the kernel, cut to the words given, zeroes to the end. */
static __always_inline void read_string(u64 *to, u64 from)
{
	u64 alive = ~0ULL;

#pragma unroll
	for (int i = 0; i < STRING_WORDS; i++) {
		u64 word, ends;

		KPT_AT(word, from + i * 8);
		/* The lowest bit that is set marks the first zero byte; those above may be wrong. */
		ends = (word - 0x0101010101010101ULL) & ~word & 0x8080808080808080ULL;
		if (ends)
			word &= ((ends & -ends) - 1) >> 7;
		to[i] = word & alive;
		if (ends)
			alive = 0;
	}
}

#endif
