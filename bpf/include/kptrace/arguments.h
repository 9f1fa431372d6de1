// SPDX-License-Identifier: GPL-2.0-only
/* What a look-up's function was called with and what it returned, at either end, for tracing programs and for kprobes. */
#ifndef KPTRACE_ARGUMENTS_H
#define KPTRACE_ARGUMENTS_H

#include <kptrace/follow.h>

#define NF_DROP 0
#define NF_STOLEN 2

/* What the loader fills in per function: signals/lookup_function_layout.py, Hole, has the same order. */
enum {
	ARG_PACKET,
	ARG_CHAIN,
	ARG_SKB,
	ARG_STATE,
	ARG_TABLE,
	ARG_RESULT,
	ARG_STACK,
	STACK_RETURN, /* what the return adds to the stack pointer */
	SAVED_0,
	SAVED_1,
	SAVED_2,
	SAVED_3,
	PACKET_SKB,
	PACKET_STATE,
	STATE_HOOK,
	STATE_PF,
	STATE_NET,
	NET_INUM,
	SKB_NFCT,
	CONN_STATUS,
	CHAIN_TABLE,
	CHAIN_HANDLE,
	CHAIN_NAME,
	TABLE_HANDLE,
	TABLE_NAME,
	TABLE_FAMILY,
	TABLE_FAMILY_SHIFT,
	BASE_PRIORITY,
	BASE_TYPE,
	TYPE_TYPE,
	TYPE_NAT,
	XT_NAME,
	XT_PRIORITY,
	HOST_NETNS,
};

static __always_inline u64 skb_of(u64 *ctx, u64 legacy)
{
	u64 packet, skb;

	if (legacy) {
		KPT_FIELD(u64, skb, ctx, ARG_SKB);
	} else {
		KPT_FIELD(u64, packet, ctx, ARG_PACKET);
		KPT_READ(u64, skb, packet, PACKET_SKB);
	}
	return skb;
}

static __always_inline u64 state_of(u64 *ctx, u64 legacy)
{
	u64 packet, state;

	if (legacy) {
		KPT_FIELD(u64, state, ctx, ARG_STATE);
	} else {
		KPT_FIELD(u64, packet, ctx, ARG_PACKET);
		KPT_READ(u64, state, packet, PACKET_STATE);
	}
	return state;
}

/* What a walk is found by at its end, and the set that it waits in. */
static __always_inline u64 key_of(u64 *ctx, u64 legacy)
{
	u64 key;

#ifdef KPT_TYPED
	key = skb_of(ctx, legacy);
#else
	KPT_FIELD(u64, key, ctx, ARG_STACK);
#endif
	return key;
}

static __always_inline u64 check_of(u64 *ctx, u64 legacy)
{
	u64 check;

#ifdef KPT_TYPED
	if (legacy) {
		KPT_FIELD(u64, check, ctx, ARG_STATE);
	} else {
		KPT_FIELD(u64, check, ctx, ARG_PACKET);
	}
#else
	u64 saved;

	KPT_FIELD(u64, check, ctx, SAVED_0);
	KPT_FIELD(u64, saved, ctx, SAVED_1);
	check = check * 31 + saved;
	KPT_FIELD(u64, saved, ctx, SAVED_2);
	check = check * 31 + saved;
	KPT_FIELD(u64, saved, ctx, SAVED_3);
	check = check * 31 + saved;
#endif
	return check;
}

/* NF_DROP, whatever errno is above it; since v6.7 also NF_STOLEN with an errno: nf_tables freed the packet itself. */
static __always_inline u32 is_drop(u64 result)
{
	u64 verdict = result & 0xff;

	return verdict == NF_DROP || (verdict == NF_STOLEN && (u32)result >> 16);
}

#endif
