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
 */
#include <linux/types.h>
#include <kptrace/rewrite.h>
#include <kptrace/task.h>

#define AF_INET 2
#define AF_INET6 10
#define AF_NETLINK 16
#define NETLINK_NETFILTER 12
#define NLMSG_ERROR 2
#define BATCH_BEGIN 0x10
#define SOL_IP 0
#define SOL_IPV6 41
#define SO_SET_REPLACE 64
#define REPLACE_BYTES 92 /* struct ipt_replace up to num_counters, the same for both families */
#define MAX_RUNNING 1024
#define RING_PAGES 256
#define VECTORS 4
#define ANSWERS 16
#define FORCE_WAKEUP 2

BPF_F_TABLE("array", u32, struct flight, flight, 1, 0);
BPF_HASH(running, u64, struct started, MAX_RUNNING);
BPF_F_TABLE("percpu_array", u32, struct rewrite_record, scratch, 1, 0);
BPF_F_TABLE("array", u32, u64, lost, LOST_KINDS, KPT_F_MMAPABLE);
BPF_RINGBUF_OUTPUT(events, RING_PAGES);

static __always_inline void lose(u32 kind)
{
	u64 *value = lost.lookup(&kind);

	if (value)
		__sync_fetch_and_add(value, 1);
}

/* Moves with every commit in the socket's namespace: the generation itself, or (before v6.17) one bit of it. */
static __always_inline u32 sequence_of(u64 sk)
{
	u64 net, sequence = 0;

	KPT_FOLLOW(u64, net, sk, KPT_SOCK, KPT_SOCK_NET);
#if defined(KPT_NET_BASE_SEQ)
	KPT_FOLLOW(u32, sequence, net, KPT_NET, KPT_NET_BASE_SEQ);
#elif defined(KPT_NET_GENCURSOR)
	KPT_FOLLOW(u8, sequence, net, KPT_NET, KPT_NET_GENCURSOR);
#endif
	return sequence;
}

static __always_inline u32 netns_of(u64 sk)
{
	u64 net, inode;

	KPT_FOLLOW(u64, net, sk, KPT_SOCK, KPT_SOCK_NET);
	KPT_FOLLOW(u32, inode, net, KPT_NET, KPT_NET_INUM);
	return inode;
}

static __always_inline u32 queued_on(u64 sk)
{
	u64 count;

	KPT_FOLLOW(u32, count, sk, KPT_SOCK, KPT_SOCK_QUEUE_LENGTH);
	return count;
}

static __always_inline int is_netfilter(u64 sk)
{
	u64 family, protocol;

	KPT_FOLLOW(u16, family, sk, KPT_SOCK, KPT_SOCK_FAMILY);
	if (family != AF_NETLINK)
		return 0;
	KPT_FOLLOW(u16, protocol, sk, KPT_SOCK, KPT_SOCK_PROTOCOL);
	return protocol == NETLINK_NETFILTER;
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

/* 1: a batch, 0: something else, -1: its pages are not there yet, or the header is in pieces: look again at the exit. */
static __always_inline int begins_batch(u64 base)
{
	struct {
		u32 length;
		u16 type;
		u16 flags;
	} header = {};

	if (kpt_read_user(&header, sizeof(header), (void *)base))
		return -1;
	return header.type == BATCH_BEGIN;
}

static __always_inline int vector_begins_batch(u64 base, u64 count)
{
	struct user_vector vector = {};

#pragma unroll
	for (int i = 0; i < VECTORS; i++) {
		if (i >= count)
			return 0;
		if (kpt_read_user(&vector, sizeof(vector), (void *)(base + i * sizeof(vector))))
			return -1;
		if (vector.length)
			return vector.length < 8 ? -1 : begins_batch(vector.base);
	}
	return -1;
}

static __always_inline void begin_batch(u64 sk, u64 now, u32 kind, u64 base, u64 count, u32 flags)
{
	struct started started = {};
	int batch = kind == KIND_FLAT ? (count < 16 ? 0 : begins_batch(base)) : vector_begins_batch(base, count);

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

/* The newest error among the messages that were queued on the sender's socket meanwhile; older ones may wait there too. */
static __always_inline s32 queued_error(u64 sk, u32 answers)
{
	u64 message, data, head, code;

	KPT_FOLLOW(u64, message, sk, KPT_SOCK, KPT_SOCK_QUEUE_LAST);
#pragma unroll
	for (int i = 0; i < ANSWERS; i++) {
		/* Keeps clang from making one bound of two, by whose `!=` the verifier sees no end. */
		asm volatile("" : "+r"(answers));
		if (i >= answers)
			break;
		KPT_FOLLOW(u64, data, message, KPT_SKB, KPT_SKB_DATA);
		KPT_WORD(head, data, 0);
		KPT_WORD(code, data, 2);
		if (((head >> 32) & 0xffff) == NLMSG_ERROR && (s32)code < 0)
			return (s32)code;
		KPT_FOLLOW(u64, message, message, KPT_SKB, KPT_SKB_PREV);
	}
	return 0;
}

/* Append at most COPY_BYTES from the user's memory; returns bytes in the buffer. */
static __always_inline u64 append(struct rewrite_record *record, u64 at, u64 base, u64 length)
{
	u64 size = length > COPY_BYTES ? COPY_BYTES : length;

	if (at >= COPY_BYTES || size == 0)
		return at;
	if (size > COPY_BYTES - at)
		size = COPY_BYTES - at;
	asm volatile("%0 &= 4095" : "+r"(at));
	asm volatile("%0 &= 8191" : "+r"(size));
	/* Alone: with another comparison clang makes one of both, on a copy, which says nothing to verifiers before v6.11. */
	if (size > COPY_BYTES)
		return at;
	if (kpt_read_user(&record->data[at], size, (void *)base)) {
		record->head.flags |= FLAG_UNREAD;
		return at;
	}
	return at + size;
}

static __always_inline void read_tail(struct rewrite_head *head, u64 base, u64 length)
{
	if (length >= TAIL_BYTES && !kpt_read_user(head->tail, TAIL_BYTES, (void *)(base + length - TAIL_BYTES)))
		head->flags |= FLAG_TAIL;
}

static __always_inline u64 copy_batch(struct rewrite_record *record, u64 base, u64 count, u32 kind)
{
	struct user_vector vector = {};
	u64 copied = 0;

	if (kind != KIND_VECTOR) {
		record->head.size = count;
		read_tail(&record->head, base, count);
		return append(record, 0, base, kind == KIND_FLAT || count < REPLACE_BYTES ? count : REPLACE_BYTES);
	}
#pragma unroll
	for (int i = 0; i < VECTORS; i++) {
		if (i >= count || kpt_read_user(&vector, sizeof(vector), (void *)(base + i * sizeof(vector))))
			break;
		copied = append(record, copied, vector.base, vector.length);
		if (copied >= COPY_BYTES)
			break;
	}
	if (count && !kpt_read_user(&vector, sizeof(vector), (void *)(base + (count - 1) * sizeof(vector))))
		read_tail(&record->head, vector.base, vector.length);
	return copied;
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

static __always_inline int still_no_batch(struct rewrite_record *record, u64 copied)
{
	u32 *words = (u32 *)record->data;

	return copied < 8 || (words[1] & 0xffff) != BATCH_BEGIN;
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
