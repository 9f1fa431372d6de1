// SPDX-License-Identifier: GPL-2.0-only
/* The xtables lock: who waits for it, and who holds it.
 *
 * A lock file is known by its name, whatever folder or container it is mounted in. A wait is seen in flock(2) itself. A
 * lock's end is not: iptables-restore and kube-proxy close the file, iptables just exits, and a child may have inherited
 * the descriptor. The tracepoint flock_lock_inode tells of all of these, and it costs nothing where no flock() lock is
 * given up: close(2) itself is not traced.
 */
#include <linux/types.h>
#include <kptrace/task.h>
#include <kptrace/types.h>
#include <kptrace/xtables_lock.h>

#define LOCK_SH 1
#define LOCK_EX 2
#define LOCK_UN 8
#define F_UNLCK 2
#define FILE_LOCK_DEFERRED 1
#define EAGAIN 11
#define NAME_LENGTH 12
#define NAME_WORD 0x2e73656c62617478 /* "xtables.", the first byte lowest, as all machines here have it */
#define NAME_REST 0x6b636f6c	     /* "lock" */
#define REPEAT_NS 3000000000	     /* iptables tries again after a second, kube-proxy after a fifth of one */
#define MAX_WAITS 1024
#define MAX_HOLDS 256
#define RING_PAGES 16
#define NO_WAKEUP 1
#define FORCE_WAKEUP 2

#if defined(KPT_LOCK_FILE_CORE) /* 6.12 has a struct file_lock_core in it, 6.1 has not */
#define LOCK_FILE KPT_LOCK_FILE_CORE
#define LOCK_TYPE KPT_LOCK_TYPE_CORE
#else
#define LOCK_FILE KPT_LOCK_FILE
#define LOCK_TYPE KPT_LOCK_TYPE
#endif

BPF_HASH(waiting, u64, struct lock_state, MAX_WAITS);
BPF_HASH(attempts, struct attempt_key, struct lock_state, MAX_WAITS);
BPF_HASH(held, u64, struct lock_state, MAX_HOLDS);
BPF_F_TABLE("array", u32, u64, lost, LOST_KINDS, KPT_F_MMAPABLE);
BPF_RINGBUF_OUTPUT(events, RING_PAGES);

static __always_inline void lose(u32 kind)
{
	u64 *value = lost.lookup(&kind);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline int is_lock_file(u64 file)
{
	u64 dentry, length, name, word, rest;

	KPT_FOLLOW(u64, dentry, file, KPT_FILE, KPT_FILE_DENTRY);
	KPT_FOLLOW(u32, length, dentry, KPT_DENTRY, KPT_DENTRY_LENGTH);
	if (length != NAME_LENGTH)
		return 0;
	KPT_FOLLOW(u64, name, dentry, KPT_DENTRY, KPT_DENTRY_NAME);
	KPT_WORD(word, name, 0);
	KPT_WORD(rest, name, 1);
	return word == NAME_WORD && (u32)rest == NAME_REST;
}

static __always_inline void describe(struct lock_state *state, u64 file)
{
	u64 id = bpf_get_current_pid_tgid(), task = bpf_get_current_task(), inode, number, super, device;

	KPT_FOLLOW(u64, inode, file, KPT_FILE, KPT_FILE_INODE);
	KPT_FOLLOW(u64, number, inode, KPT_INODE, KPT_INODE_NUMBER);
	KPT_FOLLOW(u64, super, inode, KPT_INODE, KPT_INODE_SUPER);
	KPT_FOLLOW(u32, device, super, KPT_SUPER, KPT_SUPER_DEVICE);
	state->tgid = id >> 32;
	state->tid = id;
	state->netns = task_netns(task);
	state->file = file;
	state->inode = number;
	state->device = device;
	task_parents(task, state->parents);
}

/* flock(fd, operation) */
int enter_flock(u64 *ctx)
{
	u64 descriptor, operation, file, id;
	struct lock_state *before, state = {};
	struct attempt_key key = {};

	KPT_LOAD64(operation, ctx, 24);
	if (operation & LOCK_UN || !(operation & (LOCK_SH | LOCK_EX)))
		return 0;
	KPT_LOAD64(descriptor, ctx, 16);
	file = task_file(descriptor);
	if (!file || !is_lock_file(file))
		return 0;
	/* The lock is this file's already, and is converted: no wait. */
	if (held.lookup(&file))
		return 0;
	state.begin_ns = bpf_ktime_get_ns();
	describe(&state, file);
	key.file = file;
	key.tgid = state.tgid;
	before = attempts.lookup(&key);
	if (before && state.begin_ns - before->end_ns < REPEAT_NS)
		state.begin_ns = before->begin_ns;
	id = bpf_get_current_pid_tgid();
	if (waiting.update(&id, &state))
		lose(LOST_WAITS_FULL);
	return 0;
}

int exit_flock(u64 *ctx)
{
	struct lock_state *waiter, *holder, state;
	struct attempt_key key = {};
	u64 id = bpf_get_current_pid_tgid(), result, now;

	waiter = waiting.lookup(&id);
	if (!waiter)
		return 0;
	now = bpf_ktime_get_ns();
	state = *waiter;
	waiting.delete(&id);
	state.end_ns = now;
	key.file = state.file;
	key.tgid = state.tgid;
	KPT_LOAD64(result, ctx, 16);
	if (result) {
		if (attempts.update(&key, &state))
			lose(LOST_WAITS_FULL);
		return 0;
	}
	attempts.delete(&key);
	holder = held.lookup(&state.file);
	if (holder)
		holder->begin_ns = now;
	state.kind = LOCK_TAKEN;
	if (events.ringbuf_output(&state, sizeof(state), FORCE_WAKEUP))
		lose(LOST_RING_FULL);
	return 0;
}

static __always_inline void taken(u64 file)
{
	struct lock_state state = {};

	if (held.lookup(&file) || !is_lock_file(file))
		return;
	describe(&state, file);
	state.kind = LOCK_RELEASED;
	state.begin_ns = bpf_ktime_get_ns();
	if (held.update(&file, &state))
		lose(LOST_HOLDS_FULL);
}

static __always_inline void given_up(u64 file)
{
	struct lock_state *holder = held.lookup(&file), state;

	if (!holder)
		return;
	state = *holder;
	held.delete(&file);
	state.end_ns = bpf_ktime_get_ns();
	if (events.ringbuf_output(&state, sizeof(state), NO_WAKEUP))
		lose(LOST_RING_FULL);
}

/* flock_lock_inode(inode, request, result): every decision on a flock() lock, and every end of one. */
int lock_decided(u64 *ctx)
{
	u64 request, type, file, result;

	KPT_LOAD64(request, ctx, 8);
	KPT_LOAD64(result, ctx, 16);
	KPT_FOLLOW(u8, type, request, KPT_LOCK, LOCK_TYPE);
	KPT_FOLLOW(u64, file, request, KPT_LOCK, LOCK_FILE);
	if (type == F_UNLCK)
		given_up(file);
	else if (!result)
		taken(file);
	else if ((s32)result == FILE_LOCK_DEFERRED || (s32)result == -EAGAIN)
		given_up(file); /* a conversion gives the old lock up before it fails or waits for the new one */
	return 0;
}
