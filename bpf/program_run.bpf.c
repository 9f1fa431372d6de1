// SPDX-License-Identifier: GPL-2.0-only
/* How long a run of another BPF program takes: fentry and fexit at its first function, once for each program.
 *
 * A run is all that the kernel waits for: a program that is tail-called from it belongs to it. It waits in its slot keyed by
 * the address of what the program was called with and verified by the number of the pair that opened it.
 */
#include <linux/types.h>
#define OWNERS 64 /* groups: programs of one kind at one hook */
#include <kptrace/types.h>
#include <kptrace/follow.h>
#include <kptrace/hist.h>
#include <kptrace/sampling.h>
#include <kptrace/service.h>
#include <kptrace/slots.h>

#define CELLS_PER_GROUP 6 /* family (ipv4, ipv6, other) x verdict (accept, drop) */
#define MAX_SERVICES 16384
#define PAIRS 128

#define ETHERTYPE_IPV4 0x0008 /* as read by a little-endian CPU */
#define ETHERTYPE_IPV6 0xdd86
#define TC_SHOT 2
#define XDP_ACCEPTS_FIRST 2 /* XDP_PASS, XDP_TX, XDP_REDIRECT */
#define XDP_ACCEPTS 3
#define V4_MAPPED 0xffff0000

/* What the loader fills in per program: signals/datapath_tracer.py, Hole, has the same order. */
enum { GROUP, SERIAL, PAIR, KIND, FAMILY, WALK, NAMED };
enum { KIND_PACKET, KIND_FRAME, KIND_CALL };
enum { FAMILY_IPV4, FAMILY_IPV6, FAMILY_OTHER, FAMILY_BY_PACKET };
enum { VALUE_SEEN = VALUE_COUNTS + 1 };

/* When each pair last opened a slot. */
struct seen {
	char at_ns[PAIRS * sizeof(u64)];
};

BPF_F_TABLE("array", u32, struct config, config, 1, KPT_F_MMAPABLE);
BPF_ARRAY(slots, struct slots, 1);
BPF_F_TABLE("percpu_array", u32, struct cpu, cpus, 1, 0);
BPF_F_TABLE("array", u32, struct hist, cells, OWNERS *CELLS_PER_GROUP, KPT_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct counts, counts, 1, KPT_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct seen, seen, 1, KPT_F_MMAPABLE);
BPF_F_TABLE("hash", struct service_key4, u32, services4, MAX_SERVICES, 1);
BPF_F_TABLE("hash", struct service_key6, u32, services6, MAX_SERVICES, 1);
BPF_F_TABLE("array", u32, struct service_hist, service_cells, MAX_SERVICES, KPT_F_MMAPABLE);

#define KPT_LOAD16(to, from, offset) asm volatile("%0 = *(u16 *)(%1 + %2)" : "=r"(to) : "r"(from), "i"(offset))

static __always_inline u64 family_of(u64 called_with, u64 kind)
{
	u64 family, type, data;

	KPT_CONSTANT(family, FAMILY);
	if (family != FAMILY_BY_PACKET)
		return family;
	if (kind == KIND_PACKET) {
		KPT_LOAD16(type, called_with, KPT_SKB_PROTOCOL);
	} else {
		KPT_LOAD64(data, called_with, KPT_XDP_DATA);
		KPT_AT(type, data + 8);
		type = type >> 32 & 0xffff;
	}
	return type == ETHERTYPE_IPV4 ? FAMILY_IPV4 : type == ETHERTYPE_IPV6 ? FAMILY_IPV6 : FAMILY_OTHER;
}

/* The known Service that a connect() is for, by the address that the caller gave: the program has not replaced it yet. */
static __always_inline u32 service_of(u64 called_with)
{
	u32 *service = 0;
#ifdef KPT_CALL_ADDRESS
	u64 named, sock, address, protocol, word, low, high;

	KPT_CONSTANT(named, NAMED);
	if (!named)
		return NONE;
	KPT_LOAD64(sock, called_with, KPT_CALL_SOCK);
	KPT_LOAD16(protocol, sock, KPT_SOCK_PROTOCOL);
	KPT_LOAD64(address, called_with, KPT_CALL_ADDRESS);
	KPT_AT(word, address);
	low = word >> 32;
	high = V4_MAPPED;
	if (named == 6) {
		KPT_AT(low, address + 8);
		KPT_AT(high, address + 16);
	}
	if (named == 4 || (!low && (u32)high == V4_MAPPED)) {
		struct service_key4 key = {};

		key.address = named == 4 ? low : high >> 32;
		key.port = word >> 16;
		key.protocol = protocol;
		service = services4.lookup(&key);
	} else {
		struct service_key6 key = {};

		key.address[0] = low;
		key.address[1] = high;
		key.port = word >> 16;
		key.protocol = protocol;
		service = services6.lookup(&key);
	}
#endif
	return service ? *service : NONE;
}

static __always_inline u64 is_drop(u64 kind, u64 result)
{
	u32 code = result;

	if (kind == KIND_FRAME)
		return (u32)(code - XDP_ACCEPTS_FIRST) >= XDP_ACCEPTS;
	return code == (kind == KIND_CALL ? 0 : TC_SHOT);
}

int run_enter(u64 *ctx)
{
	u64 called_with, low, kind, group, serial, pair, walk, below, now;
	struct config *settings;
	struct slot *slot;
	struct cpu *cpu;
	u32 zero = 0;
	u64 *seen_at;

	KPT_VALUE(settings, VALUE_CONFIG);
	if (!settings->armed)
		return 0;
	cpu = cpus.lookup(&zero);
	if (!cpu)
		return 0;
	KPT_CONSTANT(walk, WALK);
	below = walk == WALK_FIRST ? settings->first_below : settings->rest_below;
	if (below != ALL_BELOW && random32(cpu) >= below)
		return 0;
	cpu->opened[walk & 1]++;

	KPT_LOAD64(called_with, ctx, 0);
	KPT_LOW32(low, called_with);
	KPT_CONSTANT(kind, KIND);
	KPT_CONSTANT(group, GROUP);
	KPT_CONSTANT(serial, SERIAL);
	KPT_CONSTANT(pair, PAIR);
	slot = claim(set_of(low), called_with, serial, group);
	slot->key = called_with;
	slot->check = serial;
	slot->owner = group;
	slot->cell = group * CELLS_PER_GROUP + family_of(called_with, kind) * 2;
	slot->service = service_of(called_with);
	KPT_VALUE(seen_at, VALUE_SEEN);
	now = bpf_ktime_get_ns();
	seen_at[pair & (PAIRS - 1)] = now;
	slot->opened_ns = now;
	return 0;
}

int run_leave(u64 *ctx)
{
	u64 called_with, low, serial, kind, result;
	struct slot *slot;
	struct set *set;

	KPT_LOAD64(called_with, ctx, 0);
	KPT_LOW32(low, called_with);
	set = set_of(low);
	slot = &set->way[0];
	if (slot->key != called_with) {
		slot = &set->way[1];
		if (slot->key != called_with)
			return 0; /* not sampled */
	}
	KPT_CONSTANT(serial, SERIAL);
	if (slot->check != serial) {
		count(slot->owner, COUNT_ELSEWHERE);
	} else {
		u64 duration = bpf_ktime_get_ns() - slot->opened_ns;
		u32 cell = slot->cell, service = slot->service;
		struct hist *hist;

		KPT_CONSTANT(kind, KIND);
		KPT_LOAD64(result, ctx, 8);
		cell += is_drop(kind, result);
		hist = cells.lookup(&cell);
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
	slot->key = 0;
	return 0;
}
