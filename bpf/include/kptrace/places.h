// SPDX-License-Identifier: GPL-2.0-only
/* Places: what a walk is counted under. signals/lookup_function_places.py has the same layout and numbers. */
#ifndef KPTRACE_PLACES_H
#define KPTRACE_PLACES_H

#include <kptrace/follow.h>

#define OWNERS 256 /* places */
#define HOST_PLACES 152
#define POD_PLACES 64
#define OTHER_PLACE (HOST_PLACES + POD_PLACES) /* 40 of them: host or pod x data plane x IP family x hook */
#define HOOKS 5

/* What a place is called, and by that what it is: a chain that is made anew under its old name is the same place. */
struct name {
	u8 pod;
	u8 legacy;
	u8 nfproto; /* the packets' */
	u8 hook;
	u8 table_family; /* nf_tables: the table's own, which may be inet */
	u8 zero[3];
	u64 table[STRING_WORDS]; /* bytes, with zeroes to the end */
	u64 chain[STRING_WORDS]; /* empty for a legacy table */
};

/* A chain as the kernel knows it: only in a cache of what was found out about it, which may forget. Its handles are never
 * given again in its network namespace; a namespace's number may be. */
struct chain_key {
	u64 chain;   /* address, or first half of a legacy table's name */
	u64 handles; /* the table's and the chain's, or the second half */
	u32 netns;
	u8 hook;
	u8 nfproto;
	u8 legacy;
	u8 zero;
};

#define CHAIN_NAT 1    /* NAT's own hooks call it, for first packets only */
#define CHAIN_BEFORE 2 /* it comes before NAT in its hook */

struct chain {
	u32 place;
	u32 flags;
};

struct learnt {
	u64 used[2]; /* where the search for a free number begins, host and pod */
	u64 nat[4];  /* whether a NAT chain was ever walked: host or pod x IP family */
	u64 folded;  /* chains that got no number of their own */
};

#endif
