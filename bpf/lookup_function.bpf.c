// SPDX-License-Identifier: GPL-2.0-only
/* How long nft_do_chain(), ipt_do_table() and ip6t_do_table() take: in every network namespace, by table and chain.
 *
 * Compiled with KPT_TYPED for fentry and fexit, where arguments are typed pointers and there again at the exit, and without
 * for kprobe and kretprobe, where they are numbers in registers and at the return there are none. A walk waits in its slot
 * keyed by the skb and verified by a pointer into its caller's stack (nft_pktinfo, nf_hook_state); for kprobes keyed by the
 * stack pointer and verified by the registers that a function must give back as it found them.
 */
#include <linux/types.h>
#include <kptrace/types.h>
#include <kptrace/follow.h>
#include <kptrace/hist.h>
#include <kptrace/places.h>
#include <kptrace/arguments.h>
#include <kptrace/sampling.h>
#include <kptrace/slots.h>

enum { VALUE_LEARNT = VALUE_COUNTS + 1 };

#define STATUS_SRC_NAT_DONE 0x80
#define STATUS_DST_NAT_DONE 0x100
#define PRIORITY_NAT_DST -100
#define PRIORITY_NAT_SRC 100
#define ATTEMPTS 4

BPF_F_TABLE("array", u32, struct config, config, 1, KPT_F_MMAPABLE);
BPF_ARRAY(slots, struct slots, 1);
BPF_F_TABLE("percpu_array", u32, struct cpu, cpus, 1, 0);
BPF_F_TABLE("array", u32, struct hist, cells, OWNERS *CELLS_PER_OWNER, KPT_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct counts, counts, 1, KPT_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct learnt, learnt, 1, KPT_F_MMAPABLE);
BPF_F_TABLE("lru_hash", struct chain_key, struct chain, chains, 4096, 0);
BPF_F_TABLE("hash", struct name, u32, names, HOST_PLACES + POD_PLACES, 0);
BPF_F_TABLE("hash", u32, struct name, places, HOST_PLACES + POD_PLACES, 0);

/* Whether a priority is before NAT's in this hook. */
static __always_inline u32 before_nat(u64 hook, u64 word)
{
	s64 priority = (s64)(word << 32) >> 32;

	return priority < (hook == 0 || hook == 3 ? PRIORITY_NAT_DST : PRIORITY_NAT_SRC) ? CHAIN_BEFORE : 0;
}

/* A number for a name: the one that it has, a free one, or the one for all that got none. */
static __always_inline u32 number_of(struct name *name, struct learnt *learnt)
{
	u32 *known = names.lookup(name), first, end, number;

	if (known)
		return *known;
	first = name->pod ? HOST_PLACES : 0;
	end = name->pod ? HOST_PLACES + POD_PLACES : HOST_PLACES;
	number = first + learnt->used[name->pod & 1];
	/* Inserting under a number claims it: there is no atomic counter that a program could take a number from before
	 * Linux kernel commit 5ca419f2864a ("bpf: Add BPF_FETCH field / create atomic_fetch_add instruction") (in v5.12). */
#pragma unroll
	for (int i = 0; i < ATTEMPTS; i++) {
		if (number < end && places.insert(&number, name) == 0) {
			learnt->used[name->pod & 1] = number + 1 - first;
			if (names.insert(name, &number) == 0)
				return number;
			/* Another CPU was faster with the same name. */
			places.delete(&number);
			known = names.lookup(name);
			if (known)
				return *known;
			break;
		}
		number++;
	}
	if (number < end)
		learnt->used[name->pod & 1] = number - first;
	__sync_fetch_and_add(&learnt->folded, 1);
	number = (name->pod * 2 + name->legacy) * 2 + (name->nfproto == 10);
	return OTHER_PLACE + number * HOOKS + name->hook;
}

/* A chain that is seen for the first time, or again after the cache forgot it. */
static __always_inline struct chain resolve(u64 *ctx, struct chain_key *key, u64 legacy)
{
	struct chain found = {};
	struct name name = {};
	struct learnt *learnt;
	u64 table, word, shift, inode;

	KPT_VALUE(learnt, VALUE_LEARNT);
	KPT_CONSTANT(inode, HOST_NETNS);
	name.pod = key->netns != (u32)inode;
	name.legacy = legacy;
	name.nfproto = key->nfproto;
	name.hook = key->hook;
	if (legacy) {
		KPT_FIELD(u64, table, ctx, ARG_TABLE);
		KPT_WORD(word, table, XT_PRIORITY);
		found.flags = before_nat(key->hook, word);
		if ((u32)key->chain == 0x74616e) /* "nat" */
			found.flags = CHAIN_NAT;
		KPT_CONSTANT(shift, XT_NAME);
		read_string(name.table, table + shift);
	} else {
		u64 chain, type;

		KPT_FIELD(u64, chain, ctx, ARG_CHAIN);
		KPT_WORD(word, chain, BASE_PRIORITY);
		found.flags = before_nat(key->hook, word);
		KPT_WORD(word, chain, BASE_TYPE);
		KPT_WORD(word, word, TYPE_TYPE);
		KPT_CONSTANT(type, TYPE_NAT);
		if ((u32)word == type)
			found.flags = CHAIN_NAT;
		KPT_WORD(table, chain, CHAIN_TABLE);
		KPT_WORD(word, table, TABLE_FAMILY);
		KPT_CONSTANT(shift, TABLE_FAMILY_SHIFT);
		name.table_family = word >> shift & 63;
		KPT_WORD(word, chain, CHAIN_NAME);
		read_string(name.chain, word);
		KPT_WORD(word, table, TABLE_NAME);
		read_string(name.table, word);
	}
	if (found.flags & CHAIN_NAT)
		learnt->nat[(name.pod * 2 + (name.nfproto == 10)) & 3] = 1;
	found.place = number_of(&name, learnt);
	chains.update(key, &found);
	return found;
}

/* False for what has no IP hook: chains of the arp, bridge and netdev families, and inet ingress. */
static __always_inline int find(u64 *ctx, u64 legacy, struct chain_key *key, struct chain *chain)
{
	u64 state = state_of(ctx, legacy), table, word;
	struct chain *known;
	u32 hook, family;

	KPT_READ(u8, hook, state, STATE_HOOK);
	KPT_READ(u8, family, state, STATE_PF);
	if (hook >= HOOKS || (family != 2 && family != 10))
		return 0;
	key->hook = hook;
	key->nfproto = family;
	key->legacy = legacy;
	KPT_READ(u64, word, state, STATE_NET);
	KPT_READ(u32, key->netns, word, NET_INUM);
	if (legacy) {
		KPT_FIELD(u64, table, ctx, ARG_TABLE);
		KPT_WORD(key->chain, table, XT_NAME);
		KPT_FIELD(u64, table, ctx, ARG_TABLE);
		KPT_WORD(key->handles, table + 8, XT_NAME);
	} else {
		KPT_FIELD(u64, key->chain, ctx, ARG_CHAIN);
		KPT_WORD(table, key->chain, CHAIN_TABLE);
		KPT_WORD(key->handles, key->chain, CHAIN_HANDLE);
		KPT_WORD(word, table, TABLE_HANDLE);
		key->handles = word << 32 | (u32)key->handles;
	}
	known = chains.lookup(key);
	*chain = known ? *known : resolve(ctx, key, legacy);
	return 1;
}

/* Whether a packet whose NAT is not done at this hook walks NAT's rules there: only where there are any. A chain after NAT
 * tells by the packet itself that there are none, so does a second NAT hook; before the first one it must be known. */
static __always_inline u64 walk_of(struct chain_key *key, struct chain *chain, u64 status)
{
	struct learnt *learnt;
	u64 inode;

	if (chain->flags & CHAIN_NAT)
		return WALK_FIRST;
	if (!(chain->flags & CHAIN_BEFORE))
		return WALK_REST;
	if (key->hook == 1 || key->hook == 4)
		return status & STATUS_DST_NAT_DONE ? WALK_FIRST : WALK_REST;
	KPT_VALUE(learnt, VALUE_LEARNT);
	KPT_CONSTANT(inode, HOST_NETNS);
	return learnt->nat[((key->netns != (u32)inode) * 2 + (key->nfproto == 10)) & 3] ? WALK_FIRST : WALK_REST;
}

static __always_inline void enter(u64 *ctx, u64 legacy)
{
	u64 skb, conntrack, info, status, offset, key, low, check, undone = 0, walk = WALK_REST, random = 0;
	struct chain_key chain_key = {};
	struct config *settings;
	struct chain chain;
	struct slot *slot;
	struct cpu *cpu;
	u32 zero = 0;

	KPT_VALUE(settings, VALUE_CONFIG);
	if (!settings->armed)
		return;
	cpu = cpus.lookup(&zero);
	if (!cpu)
		return;
	if ((settings->first_below & settings->rest_below) != ALL_BELOW)
		random = random32(cpu);
	skb = skb_of(ctx, legacy);
	KPT_READ(u64, conntrack, skb, SKB_NFCT);
	info = conntrack & 7;
	conntrack &= ~7ULL;
	if (!conntrack) {
		info = info == 7 ? CT_UNTRACKED : CT_NONE;
	} else {
		KPT_CONSTANT(offset, CONN_STATUS);
		if (offset && info != 0 && info != 3) { /* NAT's rules are for new and related packets only */
			u64 state = state_of(ctx, legacy), mask;
			u32 hook;

			KPT_READ(u8, hook, state, STATE_HOOK);
			mask = hook == 0 || hook == 3 ? STATUS_DST_NAT_DONE : hook == 2 ? 0 : STATUS_SRC_NAT_DONE;
			KPT_AT(status, conntrack + offset);
			undone = mask && !(status & mask);
		}
		if (info >= 3)
			info -= 3; /* the reply direction has states of its own */
	}
	if (!undone && random >= settings->rest_below)
		return;
	if (!find(ctx, legacy, &chain_key, &chain))
		return;
	if (undone) {
		walk = walk_of(&chain_key, &chain, status);
		if (random >= (walk == WALK_FIRST ? settings->first_below : settings->rest_below))
			return;
	}
	cpu->opened[walk & 1]++;

	key = key_of(ctx, legacy);
#ifdef KPT_TYPED
	KPT_LOW32(low, key);
#else
	KPT_CONSTANT(low, STACK_RETURN);
	key += low;
	low = key;
#endif
	check = check_of(ctx, legacy);
	slot = claim(set_of(low), key, check, chain.place);
	slot->key = key;
	slot->check = check;
	slot->owner = chain.place;
	slot->cell = chain.place * CELLS_PER_OWNER + walk * 10 + info * 2;
	slot->service = NONE;
	slot->opened_ns = bpf_ktime_get_ns();
}

static __always_inline void leave(u64 *ctx, u64 legacy)
{
	u64 key = key_of(ctx, legacy), low, result;
	struct slot *slot;
	struct set *set;

#ifdef KPT_TYPED
	KPT_LOW32(low, key);
#else
	low = key;
#endif
	set = set_of(low);
	slot = &set->way[0];
	if (slot->key != key) {
		slot = &set->way[1];
		if (slot->key != key)
			return; /* not sampled */
	}
	if (slot->check != check_of(ctx, legacy)) {
		count(slot->owner, COUNT_ELSEWHERE);
	} else {
		u64 duration = bpf_ktime_get_ns() - slot->opened_ns;
		struct hist *hist;
		u32 cell;

		KPT_FIELD(u64, result, ctx, ARG_RESULT);
		cell = slot->cell + is_drop(result);
		hist = cells.lookup(&cell);
		if (hist)
			hist_add(hist, duration);
	}
	slot->key = 0;
}

int nft_enter(u64 *ctx)
{
	enter(ctx, 0);
	return 0;
}

int nft_leave(u64 *ctx)
{
	leave(ctx, 0);
	return 0;
}

int table_enter(u64 *ctx)
{
	enter(ctx, 1);
	return 0;
}

int table_leave(u64 *ctx)
{
	leave(ctx, 1);
	return 0;
}
