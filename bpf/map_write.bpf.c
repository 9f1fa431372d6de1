// SPDX-License-Identifier: GPL-2.0-only
/* Writes to other programs' BPF maps, and replacements of their programs, from the tracepoints of bpf(2).
 *
 * The map is found in the kernel, by a walk through the caller's descriptors: that needs no list of who opened what, and
 * knows inherited and passed descriptors. It counts where user space gave its id, and only with the type and sizes that
 * user space saw: no file's private data is believed to be a map for one matching word.
 *
 * The entries are read at the exit: by then the kernel has read them itself, so that they are there. Not seen are compat
 * (32-bit) calls, what BPF programs write, calls that these make (BPF_PROG_TYPE_SYSCALL), and memory that is mapped. Of a
 * program that is replaced by netlink (a tc filter, an old XDP attachment) the load is seen, not the replacement.
 */
#include <linux/types.h>
#include <kptrace/map_write_call.h>
#include <kptrace/map_write_copy.h>

#define MAX_RUNNING 1024
#define MAX_WATCHED 1024
#define MAX_AGENTS 64
#define RING_PAGES 256
#define NO_WAKEUP 1
#define FORCE_WAKEUP 2
#define WAKEUP_BYTES 131072 /* an eighth of the ring: below it the reader comes by itself */

BPF_HASH(running, u64, struct write_started, MAX_RUNNING);
BPF_HASH(watched, u32, struct watched_map, MAX_WATCHED);
BPF_HASH(agents, u32, u32, MAX_AGENTS);
BPF_F_TABLE("percpu_array", u32, struct write_record, scratch, 1, 0);
BPF_F_TABLE("array", u32, u64, unread, 1, 0);
BPF_F_TABLE("array", u32, u64, lost, LOST_KINDS, KPT_F_MMAPABLE);
BPF_RINGBUF_OUTPUT(events, RING_PAGES);

static __always_inline void lose(u32 kind)
{
	u64 *value = lost.lookup(&kind);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline int resolve_map(struct write_started *started, u32 descriptor, int by_agent)
{
	u64 map = object_of(descriptor), type, key_size, value_size, id;
	struct watched_map *known;
	u32 number;

	KPT_FOLLOW(u32, id, map, KPT_MAP, KPT_MAP_ID);
	KPT_FOLLOW(u32, type, map, KPT_MAP, KPT_MAP_TYPE);
	number = id;
	started->object = number;
	known = watched.lookup(&number);
	if (!known) {
		if (!by_agent || type != TYPE_PROG_ARRAY || started->command != MAP_UPDATE_ELEM)
			return 0;
		resolve_target(started, map);
		return 1;
	}
	KPT_FOLLOW(u32, key_size, map, KPT_MAP, KPT_MAP_KEY_SIZE);
	KPT_FOLLOW(u32, value_size, map, KPT_MAP, KPT_MAP_VALUE_SIZE);
	if (known->type != type || known->key_size != key_size || known->value_size != value_size)
		return 0;
	started->kind = WRITE_MAP;
	started->number = known->number;
	started->key_size = known->key_size;
	started->value_bytes = known->value_bytes;
	started->most = known->most;
	return 1;
}

/* 1: a call that counts, 0: none, -1: its attributes' page is not there yet. */
static __always_inline int resolve(struct write_started *started, int by_agent)
{
	union call_attributes call = {};
	u64 size = started->attribute_bytes;

	asm volatile("%0 &= 127" : "+r"(size));
	if (size > ATTRIBUTE_BYTES)
		return 0;
	if (kpt_read_user(&call, size, (void *)started->attributes))
		return -1;
	if (is_in(REPLACEMENTS, started->command)) {
		resolve_program(started, &call);
		return 1;
	}
	if (is_in(UPDATES, started->command))
		started->flags |= WRITE_VALUES;
	if (is_in(BATCHES, started->command)) {
		started->flags |= WRITE_BATCH;
		started->keys = call.batch.keys;
		started->values = call.batch.values;
		started->asked = call.batch.count;
		return resolve_map(started, call.batch.map, by_agent);
	}
	started->keys = call.element.key;
	started->values = call.element.value;
	started->asked = 1;
	return resolve_map(started, call.element.map, by_agent);
}

/* bpf(command, attributes, size) */
int enter_bpf(u64 *ctx)
{
	u64 command, attributes, size, id = bpf_get_current_pid_tgid();
	struct write_started started = {};
	u32 *role, tgid = id >> 32;
	int found;

	KPT_LOAD64(command, ctx, 16);
	started.command = command;
	if (!is_in(WRITES | REPLACEMENTS, started.command))
		return 0;
	started.begin_ns = bpf_ktime_get_ns();
	role = agents.lookup(&tgid);
	if (role ? *role == ROLE_SELF : is_in(REPLACEMENTS, started.command))
		return 0;
	KPT_LOAD64(attributes, ctx, 24);
	KPT_LOAD64(size, ctx, 32);
	started.attributes = attributes;
	started.attribute_bytes = (u32)size > ATTRIBUTE_BYTES ? ATTRIBUTE_BYTES : size;
	found = resolve(&started, role != 0);
	if (!found)
		return 0;
	if (found < 0)
		started.flags = WRITE_UNSURE;
	if (running.update(&id, &started))
		lose(LOST_RUNNING_FULL);
	return 0;
}

/* Whether so much was written since the last wake-up that the reader's own pace may be too slow. Two writers at the same time
 * may wake it once more, or a little later. */
static __always_inline u64 wakeup(u64 size)
{
	u32 zero = 0;
	u64 *bytes = unread.lookup(&zero);

	if (!bytes)
		return FORCE_WAKEUP;
	__sync_fetch_and_add(bytes, size);
	if (*bytes < WAKEUP_BYTES)
		return NO_WAKEUP;
	*bytes = 0;
	return FORCE_WAKEUP;
}

static __always_inline void tell(struct write_started *started, u64 now, u64 result)
{
	struct write_record *record;
	u32 zero = 0;
	u64 size;

	record = scratch.lookup(&zero);
	if (!record)
		return;
	fill_head(&record->head, started);
	record->head.end_ns = now;
	record->head.result = result;
	size = copy_entries(record, started);
	asm volatile("%0 &= 8191" : "+r"(size));
	if (size > ENTRY_BYTES)
		return;
	size += sizeof(struct write_head);
	if (events.ringbuf_output(record, size, wakeup(size)))
		lose(LOST_RING_FULL);
}

int exit_bpf(u64 *ctx)
{
	u64 id = bpf_get_current_pid_tgid(), now, result;
	struct write_started *known = running.lookup(&id), started;
	u32 tgid = id >> 32;
	int found = 1;

	if (!known)
		return 0;
	now = bpf_ktime_get_ns();
	started = *known;
	KPT_LOAD64(result, ctx, 16);
	if (started.flags & WRITE_UNSURE)
		found = resolve(&started, agents.lookup(&tgid) != 0);
	if (found > 0)
		tell(&started, now, result);
	else if (found < 0 && (s64)result >= 0)
		lose(LOST_UNREADABLE);
	/* Last: what is under way no more can be read from the ring. */
	running.delete(&id);
	return 0;
}
