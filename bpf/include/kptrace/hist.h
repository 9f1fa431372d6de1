// SPDX-License-Identifier: GPL-2.0-only
/* Histogram slots: four linear steps per power of two from 16 ns on; kernel/histogram.py has the same arithmetic. */
#ifndef KPTRACE_HIST_H
#define KPTRACE_HIST_H

#define HIST_FIRST_BITS 4
#define HIST_OCTAVES 27
#define HIST_SLOTS (1 + 4 * HIST_OCTAVES + 1)
#define HIST_WORDS 128 /* a power of two, so that a mask bounds the index */
#define HIST_SUM (HIST_WORDS - 1)

struct hist {
	u64 words[HIST_WORDS]; /* slots, then nothing, then the sum of all durations in ns */
};

static __always_inline u32 hist_log2(u64 value)
{
	u32 bits = 0;

	if (value >> 32) {
		bits += 32;
		value >>= 32;
	}
	if (value >> 16) {
		bits += 16;
		value >>= 16;
	}
	if (value >> 8) {
		bits += 8;
		value >>= 8;
	}
	if (value >> 4) {
		bits += 4;
		value >>= 4;
	}
	if (value >> 2) {
		bits += 2;
		value >>= 2;
	}
	if (value >> 1)
		bits += 1;
	return bits;
}

/* Slots are (lo, hi]: one is taken off, so that an upper edge stays below. */
static __always_inline u32 hist_slot(u64 duration_ns)
{
	u64 value = duration_ns - 1;
	u32 octave;

	if (duration_ns <= 1 << HIST_FIRST_BITS)
		return 0;
	octave = hist_log2(value) - HIST_FIRST_BITS;
	if (octave >= HIST_OCTAVES)
		return HIST_SLOTS - 1;
	return 1 + octave * 4 + ((value >> (octave + HIST_FIRST_BITS - 2)) & 3);
}

static __always_inline void hist_add(struct hist *hist, u64 duration_ns)
{
	u32 slot = hist_slot(duration_ns);

	__sync_fetch_and_add(&hist->words[slot & (HIST_WORDS - 1)], 1);
	__sync_fetch_and_add(&hist->words[HIST_SUM], duration_ns);
}

#endif
