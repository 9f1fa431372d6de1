// SPDX-License-Identifier: GPL-2.0-only
/* Hook brackets: how long a packet stays between two netfilter programs that enclose a base chain.
 *
 * One program per boundary closes the bracket before it and opens the one after it. Open brackets wait in a global 2-way
 * set-associative array keyed by the skb and verified by the nf_hook_state: neither a per-CPU slot nor a pid survives a
 * process-context hook that is preempted or migrated. A dropped packet closes its bracket through kfree_skb.
 */
#include <linux/types.h>
#include <kptrace/types.h>
#include <kptrace/hist.h>
#include <kptrace/service.h>

#define MAX_BRACKETS 128
#define CELLS_PER_BRACKET 20 /* walk (first, rest) x conntrack state (5) x verdict (accept, drop) */
#define SETS 4096
#define MAX_SERVICES 16384
#define SERVICE_PLANES 4
#define NONE ((u32)-1)
#define NO_BRACKET (~0ULL)
#define ALL_BELOW (1ULL << 32) /* every 32-bit number is */
#define STALE_NS 1000000000ULL

enum { CT_ESTABLISHED, CT_RELATED, CT_NEW, CT_UNTRACKED, CT_NONE };
enum { WALK_FIRST, WALK_REST };
enum { COUNT_QUEUED, COUNT_STOLEN, COUNT_EVICTED, COUNT_ELSEWHERE, COUNT_KINDS = 4 };
enum { VALUE_CONFIG, VALUE_SLOTS, VALUE_COUNTS }; /* LookupKernel has the same order */

struct config {
	u64 armed;
	u64 first_below; /* a packet is sampled where a random 32-bit number is below this */
	u64 rest_below;
};

struct slot {
	u64 skb;
	u64 state;
	u64 opened_ns;
	u32 bracket;
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
	char counts[MAX_BRACKETS * COUNT_KINDS * sizeof(u64)];
};

/* What a CPU needs of its own. Not exact: a program that is preempted here may undo what the other one did. */
struct cpu {
	u64 random;
	u64 opened[2]; /* by walk; for the estimate of what this costs */
};

BPF_F_TABLE("array", u32, struct config, config, 1, KPT_F_MMAPABLE);
BPF_ARRAY(slots, struct slots, 1);
BPF_F_TABLE("percpu_array", u32, struct cpu, cpus, 1, 0);
BPF_F_TABLE("array", u32, struct hist, cells, MAX_BRACKETS *CELLS_PER_BRACKET, KPT_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct counts, counts, 1, KPT_F_MMAPABLE);
BPF_F_TABLE("hash", struct service_key4, u32, services4, MAX_SERVICES, 1);
BPF_F_TABLE("hash", struct service_key6, u32, services6, MAX_SERVICES, 1);
BPF_F_TABLE("array", u32, struct service_hist, service_cells, MAX_SERVICES *SERVICE_PLANES, KPT_F_MMAPABLE);

static void *(*rdonly_cast)(u64 pointer, u32 btf_id) = (void *)0x7fff0002; /* kfunc 1 */

static __always_inline void count(u32 bracket, u32 kind)
{
	u64 *counts;

	KPT_VALUE(counts, VALUE_COUNTS);
	__sync_fetch_and_add(&counts[(bracket & (MAX_BRACKETS - 1)) * COUNT_KINDS + kind], 1);
}

static __always_inline struct set *set_of(u64 low)
{
	struct set *sets;

	KPT_VALUE(sets, VALUE_SLOTS);
	/* A multiplication whose top 12 of 32 bits are the number of the set. */
	return &sets[(((low & 0xffffffff) >> 6) * 0x9E3779B1ULL & 0xffffffff) >> 20];
}

static __always_inline void finish(struct slot *slot, u64 now, u32 verdict)
{
	u32 cell = slot->cell + verdict, service = slot->service;
	u64 duration = now - slot->opened_ns;
	struct hist *hist = cells.lookup(&cell);

	if (hist)
		hist_add(hist, duration);
	if (service != NONE) {
		struct service_hist *named = service_cells.lookup(&service);

		if (named) {
			__sync_fetch_and_add(&named->slots[service_slot(duration) & (SERVICE_SLOTS - 1)], 1);
			__sync_fetch_and_add(&named->sum, duration);
		}
	}
}

static __always_inline void close_bracket(u64 *ctx, u64 bracket)
{
	u64 skb, state, low;
	struct slot *slot;
	struct set *set;

	KPT_LOAD64(skb, ctx, 8);
	KPT_LOW32(low, skb);
	set = set_of(low);
	slot = &set->way[0];
	if (slot->skb != skb) {
		slot = &set->way[1];
		if (slot->skb != skb)
			return; /* not sampled */
	}
	KPT_LOAD64(state, ctx, 0);
	if (slot->state != state)
		count(slot->bracket, COUNT_QUEUED); /* reinjected: a packet that waited has no look-up time */
	else if (slot->bracket != bracket)
		count(slot->bracket, COUNT_ELSEWHERE);
	else
		finish(slot, bpf_ktime_get_ns(), 0);
	slot->skb = 0;
}

/* The slot to open in: the packet's own stale one, a free one, or a victim. CPUs start at different ways, so that two of
 * them do not claim the same free slot. A bracket whose boundary moves is opened twice by one packet: that is no loss. */
static __always_inline struct slot *claim(struct set *set, u64 skb, u64 state, u32 bracket)
{
	struct slot *slot, *other;

	if (bpf_get_smp_processor_id() & 1) {
		slot = &set->way[1];
		other = &set->way[0];
	} else {
		slot = &set->way[0];
		other = &set->way[1];
	}
	if (other->skb == skb)
		slot = other;
	if (slot->skb == skb) {
		if (slot->state != state || slot->bracket != bracket)
			count(slot->bracket, COUNT_STOLEN);
		return slot;
	}
	if (!slot->skb)
		return slot;
	if (!other->skb)
		return other;
	if (bpf_ktime_get_ns() - slot->opened_ns > STALE_NS)
		count(slot->bracket, COUNT_STOLEN);
	else
		count(slot->bracket, COUNT_EVICTED);
	return slot;
}

static __always_inline u32 service_of(u64 skb, u32 nfproto)
{
	struct dynptr packet = {};
	u32 *service = 0;

	if (dynptr_from_skb(skb, 0, &packet))
		return NONE;
	if (nfproto == 2) {
		struct service_key4 key = {};

		if (service_read4(&packet, &key) == 0)
			service = services4.lookup(&key);
	} else {
		struct service_key6 key = {};

		if (service_read6(&packet, &key) == 0)
			service = services6.lookup(&key);
	}
	return service ? *service : NONE;
}

/* A linear congruential generator per CPU: bpf_get_prandom_u32() costs more than all the rest of an unsampled packet. */
static __always_inline u64 random32(struct cpu *cpu)
{
	cpu->random = cpu->random * 6364136223846793005ULL + 1442695040888963407ULL;
	return cpu->random >> 32;
}

static __always_inline void open_bracket(u64 *ctx, u64 bracket)
{
	u64 skb, state, low, conntrack, walk_mask, nfproto, plane, info, walk = WALK_REST, random = 0;
	u32 zero = 0, service = NONE;
	struct config *settings;
	struct slot *slot;
	struct cpu *cpu;

	KPT_VALUE(settings, VALUE_CONFIG);
	if (!settings->armed)
		return;
	cpu = cpus.lookup(&zero);
	if (!cpu)
		return;
	KPT_CONSTANT(walk_mask, 2);
	if ((settings->first_below & settings->rest_below) != ALL_BELOW) {
		random = random32(cpu);
		if (!walk_mask && random >= settings->rest_below)
			return;
	}
	KPT_LOAD64(skb, ctx, 8);
	KPT_LOAD64(conntrack, skb, KPT_SKB_NFCT);
	info = conntrack & 7;
	conntrack &= ~7ULL;
	if (!conntrack) {
		info = info == 7 ? CT_UNTRACKED : CT_NONE;
	} else {
		if (walk_mask && info != 0 && info != 3) { /* NAT's rules are for new and related packets only */
			u64 entry = (u64)rdonly_cast(conntrack, KPT_NF_CONN_ID), status;

			KPT_LOAD64(status, entry, KPT_NF_CONN_STATUS);
			walk = status & walk_mask ? WALK_REST : WALK_FIRST;
		}
		if (info >= 3)
			info -= 3; /* the reply direction has states of its own */
	}
	if (random >= (walk == WALK_FIRST ? settings->first_below : settings->rest_below))
		return;
	cpu->opened[walk & 1]++;

	KPT_CONSTANT(plane, 4);
	if (plane && walk == WALK_FIRST) {
		KPT_CONSTANT(nfproto, 3);
		KPT_LOAD64(skb, ctx, 8);
		service = service_of(skb, nfproto);
		if (service != NONE)
			service = service * SERVICE_PLANES + plane - 1;
	}

	KPT_LOAD64(skb, ctx, 8);
	KPT_LOW32(low, skb);
	KPT_LOAD64(state, ctx, 0);
	slot = claim(set_of(low), skb, state, bracket);
	KPT_LOAD64(skb, ctx, 8);
	slot->skb = skb;
	KPT_LOAD64(state, ctx, 0);
	slot->state = state;
	slot->bracket = bracket;
	slot->cell = bracket * CELLS_PER_BRACKET + walk * 10 + info * 2;
	slot->service = service;
	slot->opened_ns = bpf_ktime_get_ns();
}

int lookup_boundary(u64 *ctx)
{
	u64 opens, closes;

	KPT_CONSTANT(closes, 1);
	if (closes != NO_BRACKET)
		close_bracket(ctx, closes);
	KPT_CONSTANT(opens, 0);
	if (opens != NO_BRACKET)
		open_bracket(ctx, opens);
	return KPT_NF_ACCEPT;
}

/* kfree_skb(skb, location, reason, ...): the reason is there since v5.17. */
int lookup_drop(u64 *ctx)
{
	u64 skb, reason;
	struct slot *slot;
	struct set *set;

	KPT_LOAD64(reason, ctx, 16);
	if ((u32)reason != KPT_REASON_NETFILTER_DROP)
		return 0;
	KPT_LOAD64(skb, ctx, 0);
	set = set_of(skb);
	slot = &set->way[0];
	if (slot->skb != skb) {
		slot = &set->way[1];
		if (slot->skb != skb)
			return 0;
	}
	finish(slot, bpf_ktime_get_ns(), 1);
	slot->skb = 0;
	return 0;
}

int lookup_nothing(u64 *ctx)
{
	return KPT_NF_ACCEPT;
}
