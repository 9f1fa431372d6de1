// SPDX-License-Identifier: GPL-2.0-only
/* Look-ups under way: a global 2-way set-associative array. Neither a per-CPU slot nor a pid survives a process that is
 * preempted or migrated between the two programs of a look-up. The including file says how many OWNERS there are. */
#ifndef KPTRACE_SLOTS_H
#define KPTRACE_SLOTS_H

#include <kptrace/types.h>

#define SETS 4096
#define NONE ((u32)-1)
#define STALE_NS 1000000000ULL

enum { COUNT_QUEUED, COUNT_STOLEN, COUNT_EVICTED, COUNT_ELSEWHERE, COUNT_KINDS = 4 };
enum { VALUE_CONFIG, VALUE_SLOTS, VALUE_COUNTS }; /* LookupKernel has the same order */

struct slot {
	u64 key;
	u64 check; /* must be the same at both ends, or they are not of one look-up */
	u64 opened_ns;
	u32 owner; /* number of the bracket, or of the place */
	u32 cell;
	u32 service; /* index into service_cells, or NONE */
	u32 zero[7]; /* one cache line */
};

struct set {
	struct slot way[2];
};

/* Large values are bytes for BCC, which compiles code to print each number of a value and takes 10 s for those of `slots`. */
struct slots {
	char sets[SETS * sizeof(struct set)];
};

struct counts {
	char counts[OWNERS * COUNT_KINDS * sizeof(u64)];
};

static __always_inline void count(u32 owner, u32 kind)
{
	u64 *counts;

	KPT_VALUE(counts, VALUE_COUNTS);
	__sync_fetch_and_add(&counts[(owner & (OWNERS - 1)) * COUNT_KINDS + kind], 1);
}

static __always_inline struct set *set_of(u64 low)
{
	struct set *sets;

	KPT_VALUE(sets, VALUE_SLOTS);
	/* A multiplication whose top 12 of 32 bits are the number of the set. */
	return &sets[(((low & 0xffffffff) >> 6) * 0x9E3779B1ULL & 0xffffffff) >> 20];
}

/* The slot to open in: the packet's own stale one, a free one, or a victim. CPUs start at different ways, so that two of
 * them do not claim the same free slot. A bracket whose boundary moves is opened twice by one packet: that is no loss. */
static __always_inline struct slot *claim(struct set *set, u64 key, u64 check, u32 owner)
{
	struct slot *slot, *other;

	if (bpf_get_smp_processor_id() & 1) {
		slot = &set->way[1];
		other = &set->way[0];
	} else {
		slot = &set->way[0];
		other = &set->way[1];
	}
	if (other->key == key)
		slot = other;
	if (slot->key == key) {
		if (slot->check != check || slot->owner != owner)
			count(slot->owner, COUNT_STOLEN);
		return slot;
	}
	if (!slot->key)
		return slot;
	if (!other->key)
		return other;
	if (bpf_ktime_get_ns() - slot->opened_ns > STALE_NS)
		count(slot->owner, COUNT_STOLEN);
	else
		count(slot->owner, COUNT_EVICTED);
	return slot;
}

#endif
