// SPDX-License-Identifier: GPL-2.0-only
/* Which packets are timed: decided before the clock is read. What all mechanisms of the lookup signal have in common. */
#ifndef KPTRACE_SAMPLING_H
#define KPTRACE_SAMPLING_H

#define ALL_BELOW (1ULL << 32) /* every 32-bit number is */
#define CELLS_PER_OWNER 20     /* walk (first, rest) x conntrack state (5) x verdict (accept, drop) */

enum { CT_ESTABLISHED, CT_RELATED, CT_NEW, CT_UNTRACKED, CT_NONE };
enum { WALK_FIRST, WALK_REST };

struct config {
	u64 armed;
	u64 first_below; /* a packet is sampled where a random 32-bit number is below this */
	u64 rest_below;
};

/* What a CPU needs of its own. Not exact: a program that is preempted here may undo what the other one did. */
struct cpu {
	u64 random;
	u64 opened[2]; /* by walk; for the estimate of what this costs */
};

/* A linear congruential generator per CPU: bpf_get_prandom_u32() costs more than all the rest of an unsampled packet. */
static __always_inline u64 random32(struct cpu *cpu)
{
	cpu->random = cpu->random * 6364136223846793005ULL + 1442695040888963407ULL;
	return cpu->random >> 32;
}

#endif
