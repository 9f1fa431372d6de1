// SPDX-License-Identifier: GPL-2.0-only
/* Ruleset rewrites from syscall tracepoints: how long the syscall took that carried a transaction, and how it ended.
 *
 * A send counts where its descriptor is a NETLINK_NETFILTER socket and its first bytes are an NFNL_MSG_BATCH_BEGIN. The
 * socket itself is asked, by a walk through the task's descriptors: that needs no list of processes that once opened such
 * a socket, knows inherited and passed descriptors, cannot take RTM_NEWLINK (which has the same number as BATCH_BEGIN) for
 * a batch, and gives the socket's network namespace, which its sender may have left. Not seen are io_uring, splice and
 * compat (32-bit) calls: these commits are found missing by the ruleset's generation.
 *
 * The result of a send says nothing, so three facts travel along: the ruleset's sequence at entry and exit, whether
 * another transaction ran meanwhile, and the error that the kernel queued on the sender's own socket before it returned.
 *
 * A writer may also list what is installed, or delete connections, by requests of its own. Who does is noted; the spans of
 * those that user space then follows are kept here, with their answers while the receive program is attached.
 */
#include <linux/types.h>
#include <kptrace/rewrite_copy.h>
#include <kptrace/rewrite_requests.h>
#include <kptrace/rewrite_socket.h>
#include <kptrace/task.h>

#define AF_INET 2
#define AF_INET6 10
#define SOL_IP 0
#define SOL_IPV6 41
#define SO_SET_REPLACE 64
#define MAX_RUNNING 1024
#define RING_PAGES 256
#define NO_WAKEUP 1
#define FORCE_WAKEUP 2
#define MAX_ASKERS 256
#define MAX_FOLLOWED 64
#define MAX_SPANS 512
#define MAX_ASKED 4096

BPF_F_TABLE("array", u32, struct flight, flight, 1, 0);
BPF_HASH(running, u64, struct started, MAX_RUNNING);
BPF_F_TABLE("percpu_array", u32, struct rewrite_record, scratch, 1, 0);
BPF_F_TABLE("array", u32, u64, lost, LOST_KINDS, KPT_F_MMAPABLE);
BPF_RINGBUF_OUTPUT(events, RING_PAGES);
/* Who asked, and when first; user space takes them out. Anybody may fill it: the oldest go. */
BPF_F_TABLE("lru_hash", struct request_key, u64, askers, MAX_ASKERS, 0);
BPF_HASH(followed, u32, u32, MAX_FOLLOWED);
BPF_HASH(spans, struct request_key, struct request_span, MAX_SPANS);
/* Sockets whose next messages answer a request. Nobody tells when one is closed. */
BPF_F_TABLE("lru_hash", u64, struct request_key, asked, MAX_ASKED, 0);

static __always_inline void lose(u32 kind)
{
	u64 *value = lost.lookup(&kind);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline void begin(struct started *started)
{
	u64 id = bpf_get_current_pid_tgid();
	u32 zero = 0;
	struct flight *all = flight.lookup(&zero);

	if (!all)
		return;
	if (all->running)
		started->flags |= FLAG_OVERLAP;
	__sync_fetch_and_add(&all->starts, 1);
	started->starts = all->starts;
	if (running.update(&id, started)) {
		lose(LOST_RUNNING_FULL);
		return;
	}
	__sync_fetch_and_add(&all->running, 1);
}

static __always_inline void note_request(u64 sk, u64 now, u32 what)
{
	struct request_key key = {};
	struct request_span fresh = {}, *span;
	struct request_record record = {};

	key.tgid = bpf_get_current_pid_tgid() >> 32;
	key.netns = netns_of(sk);
	key.what = what;
	if (!followed.lookup(&key.tgid)) {
		if (!askers.lookup(&key))
			askers.update(&key, &now);
		return;
	}
	asked.update(&sk, &key);
	span = spans.lookup(&key);
	if (span && now < span->last_ns + REQUEST_JOIN_NS) {
		if (now > span->last_ns)
			span->last_ns = now;
		__sync_fetch_and_add(&span->requests, 1);
		return;
	}
	if (span) {
		record.kind = KIND_REQUESTS;
		record.key = key;
		record.span = *span;
		if (events.ringbuf_output(&record, sizeof(record), NO_WAKEUP))
			lose(LOST_RING_FULL);
	}
	fresh.begin_ns = fresh.last_ns = now;
	fresh.requests = 1;
	if (spans.update(&key, &fresh))
		lose(LOST_REQUESTS_FULL);
}

static __always_inline void begin_batch(u64 sk, u64 now, u32 kind, u64 base, u64 count, u32 flags)
{
	struct started started = {};
	int batch = kind == KIND_FLAT ? (count < 16 ? 0 : begins_batch(base)) : vector_begins_batch(base, count);
	u32 what;

	if (!batch) {
		what = kind == KIND_FLAT ? requested(base, count) : vector_requested(base, count);
		if (what) {
			note_request(sk, now, what);
			return;
		}
	}
	asked.delete(&sk); /* what comes from now on answers this */
	if (!batch)
		return;
	started.begin_ns = now;
	started.sk = sk;
	started.base = base;
	started.count = count;
	started.kind = kind;
	started.flags = flags | (batch < 0 ? FLAG_UNSURE : 0);
	started.sequence = sequence_of(sk);
	started.queued = queued_on(sk);
	started.netns = netns_of(sk);
	begin(&started);
}

/* sendto(fd, buffer, length, ...) and write(fd, buffer, length) */
int enter_flat(u64 *ctx)
{
	u64 descriptor, base, length, sk;

	KPT_LOAD64(descriptor, ctx, 16);
	sk = task_socket(descriptor);
	if (!sk || !is_netfilter(sk))
		return 0;
	KPT_LOAD64(base, ctx, 24);
	KPT_LOAD64(length, ctx, 32);
	begin_batch(sk, bpf_ktime_get_ns(), KIND_FLAT, base, length, 0);
	return 0;
}

/* writev(fd, vectors, count) */
int enter_writev(u64 *ctx)
{
	u64 descriptor, base, count, sk;

	KPT_LOAD64(descriptor, ctx, 16);
	sk = task_socket(descriptor);
	if (!sk || !is_netfilter(sk))
		return 0;
	KPT_LOAD64(base, ctx, 24);
	KPT_LOAD64(count, ctx, 32);
	begin_batch(sk, bpf_ktime_get_ns(), KIND_VECTOR, base, count, 0);
	return 0;
}

static __always_inline int enter_message(u64 *ctx, u32 flags)
{
	struct user_message message = {};
	u64 descriptor, pointer, sk, now;

	KPT_LOAD64(descriptor, ctx, 16);
	sk = task_socket(descriptor);
	if (!sk || !is_netfilter(sk))
		return 0;
	now = bpf_ktime_get_ns();
	KPT_LOAD64(pointer, ctx, 24);
	if (kpt_read_user(&message, sizeof(message), (void *)pointer)) {
		lose(LOST_UNREADABLE);
		return 0;
	}
	begin_batch(sk, now, KIND_VECTOR, message.vectors, message.count, flags);
	return 0;
}

int enter_sendmsg(u64 *ctx)
{
	return enter_message(ctx, 0);
}

/* sendmmsg(fd, messages, count, flags): the first message speaks for all. The result counts messages, so that even of a
 * single one nobody knows whether the copy has all its bytes. */
int enter_sendmmsg(u64 *ctx)
{
	return enter_message(ctx, FLAG_SEVERAL);
}

/* setsockopt(fd, level, option, value, length) */
int enter_setsockopt(u64 *ctx)
{
	u64 descriptor, level, option, base, length, sk, family;
	struct started started = {};

	KPT_LOAD64(option, ctx, 32);
	if ((u32)option != SO_SET_REPLACE)
		return 0;
	KPT_LOAD64(level, ctx, 24);
	if ((u32)level != SOL_IP && (u32)level != SOL_IPV6)
		return 0;
	KPT_LOAD64(descriptor, ctx, 16);
	sk = task_socket(descriptor);
	if (!sk)
		return 0;
	KPT_FOLLOW(u16, family, sk, KPT_SOCK, KPT_SOCK_FAMILY);
	if (family != AF_INET && family != AF_INET6)
		return 0;
	KPT_LOAD64(base, ctx, 40);
	KPT_LOAD64(length, ctx, 48);
	started.begin_ns = bpf_ktime_get_ns();
	started.sk = sk;
	started.base = base;
	started.count = (u32)length;
	started.kind = (u32)level == SOL_IP ? KIND_REPLACE4 : KIND_REPLACE6;
	started.netns = netns_of(sk);
	begin(&started);
	return 0;
}

static __always_inline void fill(struct rewrite_record *record, struct started *started, u64 now)
{
	struct rewrite_head *head = &record->head;
	u64 id = bpf_get_current_pid_tgid(), task = bpf_get_current_task(), sk = started->sk;

	head->kind = started->kind;
	head->tgid = id >> 32;
	head->tid = id;
	head->flags = started->flags;
	head->begin_ns = started->begin_ns;
	head->end_ns = now;
	head->cgroup = bpf_get_current_cgroup_id();
	head->netns = started->netns;
	head->task_netns = task_netns(task);
	head->mntns = task_mntns(task);
	head->sequence_begin = started->sequence;
	head->sequence_end = sequence_of(sk);
	head->queued_begin = started->queued;
	head->queued_end = queued_on(sk);
	head->error = 0;
	if (head->queued_end > head->queued_begin && started->kind <= KIND_VECTOR)
		head->error = queued_error(sk, head->queued_end - head->queued_begin);
	task_parents(task, head->parents);
	bpf_get_current_comm(head->comm, sizeof(head->comm));
	head->size = 0;
	head->zero = 0;
}

int exit_rewrite(u64 *ctx)
{
	u32 zero = 0;
	struct flight *all = flight.lookup(&zero);
	struct rewrite_record *record;
	struct started *started;
	u64 id, now, result, copied;

	if (!all || !all->running)
		return 0;
	id = bpf_get_current_pid_tgid();
	started = running.lookup(&id);
	if (!started)
		return 0;
	now = bpf_ktime_get_ns();
	record = scratch.lookup(&zero);
	if (!record)
		return 0;
	fill(record, started, now);
	KPT_LOAD64(result, ctx, 16);
	record->head.result = result;
	if (all->starts != started->starts)
		record->head.flags |= FLAG_OVERLAP;
	copied = copy_batch(record, started->base, started->count, started->kind);
	running.delete(&id);
	__sync_fetch_and_add(&all->running, -1);
	if (record->head.flags & FLAG_UNSURE && still_no_batch(record, copied)) {
		if (record->head.flags & FLAG_UNREAD)
			lose(LOST_UNREADABLE);
		return 0;
	}
	record->head.copied = copied;
	asm volatile("%0 &= 8191" : "+r"(copied));
	if (copied > COPY_BYTES)
		return 0;
	if (events.ringbuf_output(record, sizeof(struct rewrite_head) + copied, FORCE_WAKEUP))
		lose(LOST_RING_FULL);
	return 0;
}

/* recvmsg(fd, ...) and recvfrom(fd, ...): attached only where somebody is followed. An answer waits on its socket before it
 * is asked for, so that the entry tells what the call will bring, and the exit need not be traced. */
int enter_receive(u64 *ctx)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	u64 descriptor, sk, now;
	struct request_key *key;
	struct request_span *span;

	if (!followed.lookup(&tgid))
		return 0;
	KPT_LOAD64(descriptor, ctx, 16);
	sk = task_socket(descriptor);
	if (!sk || !is_netfilter(sk) || !queued_on(sk))
		return 0;
	key = asked.lookup(&sk);
	if (!key || key->tgid != tgid) /* of a socket that is gone, and had this one's address */
		return 0;
	span = spans.lookup(key);
	now = bpf_ktime_get_ns();
	if (span && now > span->last_ns)
		span->last_ns = now;
	return 0;
}
