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
#define STALE_NS 1000000000ULL

enum { CT_ESTABLISHED, CT_RELATED, CT_NEW, CT_UNTRACKED, CT_NONE };
enum { WALK_FIRST, WALK_REST };
enum { COUNT_FIRST, COUNT_QUEUED, COUNT_STOLEN, COUNT_EVICTED, COUNT_ELSEWHERE, COUNT_REST, COUNT_KINDS = 8 };

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

BPF_F_TABLE("array", u32, struct config, config, 1, KPT_F_MMAPABLE);
BPF_ARRAY(slots, struct set, SETS);
BPF_F_TABLE("array", u32, struct hist, cells, MAX_BRACKETS *CELLS_PER_BRACKET, KPT_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, counts, MAX_BRACKETS *COUNT_KINDS, KPT_F_MMAPABLE);
BPF_F_TABLE("hash", struct service_key4, u32, services4, MAX_SERVICES, 1);
BPF_F_TABLE("hash", struct service_key6, u32, services6, MAX_SERVICES, 1);
BPF_F_TABLE("array", u32, struct service_hist, service_cells, MAX_SERVICES *SERVICE_PLANES, KPT_F_MMAPABLE);

static void *(*rdonly_cast)(u64 pointer, u32 btf_id) = (void *)0x7fff0002; /* kfunc 1 */

static __always_inline void count(u32 bracket, u32 kind)
{
	u32 index = bracket * COUNT_KINDS + kind;
	u64 *value = counts.lookup(&index);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline u32 set_index(u32 low)
{
	return ((low >> 6) * 0x9E3779B1u) >> 20; /* the top 12 bits: SETS */
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

static __always_inline void close_bracket(u64 *ctx, u32 bracket)
{
	u64 skb, state, low;
	struct slot *slot;
	struct set *set;
	u32 index;

	KPT_LOAD64(skb, ctx, 8);
	KPT_LOW32(low, skb);
	index = set_index(low);
	set = slots.lookup(&index);
	if (!set)
		return;
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

static __always_inline void open_bracket(u64 *ctx, u32 bracket)
{
	u64 skb, state, low, conntrack, walk_mask, nfproto, plane;
	u32 zero = 0, walk = WALK_REST, info, index, service = NONE;
	struct config *settings = config.lookup(&zero);
	struct slot *slot;
	struct set *set;
	u64 below;

	if (!settings || !settings->armed)
		return;
	KPT_LOAD64(skb, ctx, 8);
	KPT_LOAD64(conntrack, skb, KPT_SKB_NFCT);
	KPT_CONSTANT(walk_mask, 2);
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
	below = walk == WALK_FIRST ? settings->first_below : settings->rest_below;
	if (below <= NONE && bpf_get_prandom_u32() >= below)
		return;

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
	index = set_index(low);
	set = slots.lookup(&index);
	if (!set)
		return;
	KPT_LOAD64(skb, ctx, 8);
	KPT_LOAD64(state, ctx, 0);
	slot = claim(set, skb, state, bracket);
	KPT_LOAD64(skb, ctx, 8);
	slot->skb = skb;
	KPT_LOAD64(state, ctx, 0);
	slot->state = state;
	slot->bracket = bracket;
	slot->cell = bracket * CELLS_PER_BRACKET + walk * 10 + info * 2;
	slot->service = service;
	count(bracket, walk == WALK_FIRST ? COUNT_FIRST : COUNT_REST);
	slot->opened_ns = bpf_ktime_get_ns();
}

int lookup_boundary(u64 *ctx)
{
	u64 opens, closes;

	KPT_CONSTANT(closes, 1);
	if ((u32)closes != NONE)
		close_bracket(ctx, closes);
	KPT_CONSTANT(opens, 0);
	if ((u32)opens != NONE)
		open_bracket(ctx, opens);
	return KPT_NF_ACCEPT;
}

/* kfree_skb(skb, location, reason, ...): the reason is there since v5.17. */
int lookup_drop(u64 *ctx)
{
	u64 skb, reason;
	struct slot *slot;
	struct set *set;
	u32 index;

	KPT_LOAD64(reason, ctx, 16);
	if ((u32)reason != KPT_REASON_NETFILTER_DROP)
		return 0;
	KPT_LOAD64(skb, ctx, 0);
	index = set_index(skb);
	set = slots.lookup(&index);
	if (!set)
		return 0;
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
