// SPDX-License-Identifier: GPL-2.0-only
/* Hook brackets: how long a packet stays between two netfilter programs that enclose a base chain.
 *
 * One program per boundary closes the bracket before it and opens the one after it. Open brackets wait in slots keyed by
 * the skb and verified by the nf_hook_state. A dropped packet closes its bracket through kfree_skb.
 */
#include <linux/types.h>
#include <kptrace/types.h>
#include <kptrace/hist.h>
#include <kptrace/sampling.h>
#include <kptrace/service.h>

#define OWNERS 128 /* brackets */
#include <kptrace/slots.h>

#define MAX_SERVICES 16384
#define SERVICE_PLANES 4
#define NO_BRACKET (~0ULL)

BPF_F_TABLE("array", u32, struct config, config, 1, KPT_F_MMAPABLE);
BPF_ARRAY(slots, struct slots, 1);
BPF_F_TABLE("percpu_array", u32, struct cpu, cpus, 1, 0);
BPF_F_TABLE("array", u32, struct hist, cells, OWNERS *CELLS_PER_OWNER, KPT_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct counts, counts, 1, KPT_F_MMAPABLE);
BPF_F_TABLE("hash", struct service_key4, u32, services4, MAX_SERVICES, 1);
BPF_F_TABLE("hash", struct service_key6, u32, services6, MAX_SERVICES, 1);
BPF_F_TABLE("array", u32, struct service_hist, service_cells, MAX_SERVICES *SERVICE_PLANES, KPT_F_MMAPABLE);

static void *(*rdonly_cast)(u64 pointer, u32 btf_id) = (void *)0x7fff0002; /* kfunc 1 */

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
	if (slot->key != skb) {
		slot = &set->way[1];
		if (slot->key != skb)
			return; /* not sampled */
	}
	KPT_LOAD64(state, ctx, 0);
	if (slot->check != state)
		count(slot->owner, COUNT_QUEUED); /* reinjected: a packet that waited has no look-up time */
	else if (slot->owner != bracket)
		count(slot->owner, COUNT_ELSEWHERE);
	else
		finish(slot, bpf_ktime_get_ns(), 0);
	slot->key = 0;
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
	slot->key = skb;
	KPT_LOAD64(state, ctx, 0);
	slot->check = state;
	slot->owner = bracket;
	slot->cell = bracket * CELLS_PER_OWNER + walk * 10 + info * 2;
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
	if (slot->key != skb) {
		slot = &set->way[1];
		if (slot->key != skb)
			return 0;
	}
	finish(slot, bpf_ktime_get_ns(), 1);
	slot->key = 0;
	return 0;
}

int lookup_nothing(u64 *ctx)
{
	return KPT_NF_ACCEPT;
}
