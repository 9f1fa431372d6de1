// SPDX-License-Identifier: GPL-2.0-only
/* The phases of a rewrite: inside nfnetlink's batch (parse, commit, abort), the replacement of a legacy table (parse,
 * replace, counters), and what comes after the commit (destroy by a worker, tear-down by close()).
 *
 * Compiled with KPT_TYPED for fentry and fexit, and without for kprobe and kretprobe. Each outer function keeps its state
 * under the thread that runs it: all of these may sleep, and none runs inside itself.
 */
#include <linux/types.h>
#include <kptrace/types.h>
#include <kptrace/follow.h>
#include <kptrace/rewrite_phases.h>

/* What the loader fills in per function: signals/rewrite_phases_kernel.py, Hole, has the same order. */
enum { ARG_0, ARG_1, ARG_2, RESULT, WATCHED_NETNS, WORK_PER_NET, NET_WORK, NET_DESTROYED, TRANS_NET };

#define NETLINK_URELEASE 1
#define NETLINK_NETFILTER 12
#define SO_SET_REPLACE 64
#define WORK_PENDING 1
#define MAX_RUNNING 1024
#define MAX_SENDERS 1024
#define RING_PAGES 64
#define NO_WAKEUP 1

BPF_F_TABLE("lru_hash", u64, struct phases, running, MAX_RUNNING, 0);
BPF_F_TABLE("lru_hash", u32, u64, senders, MAX_SENDERS, 0);
BPF_F_TABLE("array", u32, struct flight, flight, 1, 0);
BPF_F_TABLE("percpu_array", u32, struct phases_record, scratch, 1, 0);
BPF_F_TABLE("array", u32, u64, lost, LOST_KINDS, KPT_F_MMAPABLE);
BPF_RINGBUF_OUTPUT(events, RING_PAGES);

static __always_inline void lose(u32 kind)
{
	u64 *value = lost.lookup(&kind);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline int is_watched(u64 net)
{
	u64 inode, watched;

	KPT_AT(inode, net + KPT_NET_INUM);
	KPT_CONSTANT(watched, WATCHED_NETNS);
	return (u32)inode == (u32)watched;
}

static __always_inline u64 net_of(u64 sk)
{
	u64 net;

	KPT_AT(net, sk + KPT_SOCK_NET);
	return net;
}

static __always_inline struct phases *mine(u32 kind)
{
	u64 id = bpf_get_current_pid_tgid();
	struct phases *phases = running.lookup(&id);

	return phases && phases->kind == kind ? phases : 0;
}

static __always_inline void begin(struct phases *phases)
{
	u64 id = bpf_get_current_pid_tgid();

	phases->tgid = id >> 32;
	phases->begin_ns = bpf_ktime_get_ns();
	if (running.update(&id, phases))
		lose(LOST_RUNNING_FULL);
}

static __always_inline void end(u32 kind, u64 now)
{
	u64 id = bpf_get_current_pid_tgid();
	struct phases *phases = mine(kind);

	if (!phases)
		return;
	phases->end_ns = now;
	if (events.ringbuf_output(phases, sizeof(*phases), NO_WAKEUP))
		lose(LOST_RING_FULL);
	running.delete(&id);
}

/* nfnetlink_rcv_batch(skb, nlh, subsystem, ...): nlh is the BATCH_BEGIN, the skb begins behind it. */
int batch_enter(u64 *ctx)
{
	struct phases phases = {};
	u64 skb, message, sk, length, first, portid;

	KPT_FIELD(u64, skb, ctx, ARG_0);
	KPT_FIELD(u64, message, ctx, ARG_1);
	KPT_AT(sk, skb + KPT_SKB_SK);
	if (!is_watched(net_of(sk)))
		return 0;
	KPT_AT(length, skb + KPT_SKB_LEN);
	KPT_AT(first, message); /* its own length is its first member */
	KPT_AT(portid, skb + KPT_SKB_CB + KPT_PARMS_PORTID);
	phases.kind = KIND_BATCH;
	phases.portid = portid;
	phases.message = message;
	phases.size = (u32)length + (((u32)first + 3) & ~3);
	begin(&phases);
	return 0;
}

int batch_leave(u64 *ctx)
{
	u64 now = bpf_ktime_get_ns(), id = bpf_get_current_pid_tgid(), message, one = 1;
	struct phases *phases = mine(KIND_BATCH);
	struct phases_record *record;
	u32 zero = 0, portid;

	record = scratch.lookup(&zero);
	if (!phases || !record)
		return 0;
	phases->end_ns = now;
	record->phases = *phases;
	message = phases->message;
	portid = phases->portid;
	running.delete(&id);
#pragma unroll
	for (int i = 0; i < HEAD_WORDS; i++)
		KPT_AT(record->head[i], message + i * 8);
	senders.update(&portid, &one);
	if (events.ringbuf_output(record, sizeof(*record), NO_WAKEUP))
		lose(LOST_RING_FULL);
	return 0;
}

static __always_inline void inner_enter(u32 kind)
{
	struct phases *phases = mine(kind);

	if (phases)
		phases->mark_ns = bpf_ktime_get_ns();
}

int commit_enter(u64 *ctx)
{
	struct phases *phases = mine(KIND_BATCH);
	u32 zero = 0;
	struct flight *all = flight.lookup(&zero);

	if (all && phases)
		phases->runs = all->runs;
	inner_enter(KIND_BATCH);
	return 0;
}

int commit_leave(u64 *ctx)
{
	struct phases *phases = mine(KIND_BATCH);
	u32 zero = 0;
	struct flight *all = flight.lookup(&zero);
	u64 result, work = 0;

	if (!phases || !phases->mark_ns || !all)
		return 0;
	phases->commit_ns += bpf_ktime_get_ns() - phases->mark_ns;
	phases->mark_ns = 0;
	KPT_FIELD(u64, result, ctx, RESULT);
	if ((u32)result)
		return 0;
	phases->flags |= FLAG_COMMITTED;
	/* A commit that deletes queues the work, which may have begun already. */
	if (all->work)
		KPT_AT(work, all->work);
	if (!all->work || work & WORK_PENDING || all->runs != phases->runs)
		all->ours = 1;
	return 0;
}

int abort_enter(u64 *ctx)
{
	inner_enter(KIND_BATCH);
	return 0;
}

int abort_leave(u64 *ctx)
{
	struct phases *phases = mine(KIND_BATCH);

	if (!phases || !phases->mark_ns)
		return 0;
	phases->abort_ns += bpf_ktime_get_ns() - phases->mark_ns;
	phases->mark_ns = 0;
	phases->flags |= FLAG_ABORTED;
	return 0;
}

/* Whether the worker's run takes out what the watched namespace deleted. There is one work for all namespaces, where this
 * is told by who queued it, or (7.2) one in each, where the first of what it takes out tells.
 */
static __always_inline int destroys_ours(struct flight *all, u64 work)
{
	u64 offset, ours = all->ours;

	KPT_CONSTANT(offset, WORK_PER_NET);
	if (offset) {
		u64 trans, net;

		KPT_CONSTANT(offset, NET_WORK);
		work -= offset;
		KPT_CONSTANT(offset, NET_DESTROYED);
		KPT_AT(trans, work + offset);
		KPT_CONSTANT(offset, TRANS_NET);
		KPT_AT(net, trans + offset);
		return is_watched(net);
	}
	all->work = work;
	all->runs++;
	all->ours = 0;
	return ours;
}

/* nf_tables_trans_destroy_work(work) */
int destroy_enter(u64 *ctx)
{
	struct phases phases = {.kind = KIND_DESTROY};
	u32 zero = 0;
	struct flight *all = flight.lookup(&zero);
	u64 work;

	KPT_FIELD(u64, work, ctx, ARG_0);
	if (all && destroys_ours(all, work))
		begin(&phases);
	return 0;
}

int destroy_leave(u64 *ctx)
{
	end(KIND_DESTROY, bpf_ktime_get_ns());
	return 0;
}

/* nft_rcv_nl_event(block, event, notify): a netlink socket is closed. */
int close_enter(u64 *ctx)
{
	struct phases phases = {.kind = KIND_TEARDOWN};
	u64 event, notify, net, portid, protocol;
	u32 key;

	KPT_FIELD(u64, event, ctx, ARG_1);
	if (event != NETLINK_URELEASE)
		return 0;
	KPT_FIELD(u64, notify, ctx, ARG_2);
	KPT_AT(protocol, notify + KPT_NOTIFY_PROTOCOL);
	if ((u32)protocol != NETLINK_NETFILTER)
		return 0;
	KPT_AT(net, notify + KPT_NOTIFY_NET);
	if (!is_watched(net))
		return 0;
	KPT_AT(portid, notify + KPT_NOTIFY_PORTID);
	key = portid;
	if (!senders.lookup(&key))
		return 0; /* it only read */
	senders.delete(&key);
	phases.portid = key;
	begin(&phases);
	return 0;
}

int close_leave(u64 *ctx)
{
	end(KIND_TEARDOWN, bpf_ktime_get_ns());
	return 0;
}

/* do_ipt_set_ctl(sk, command, ...) and do_ip6t_set_ctl() */
int replace_enter(u64 *ctx)
{
	struct phases phases = {.kind = KIND_REPLACE};
	u64 sk, command;

	KPT_FIELD(u64, command, ctx, ARG_1);
	if ((u32)command != SO_SET_REPLACE)
		return 0;
	KPT_FIELD(u64, sk, ctx, ARG_0);
	if (is_watched(net_of(sk)))
		begin(&phases);
	return 0;
}

int replace_leave(u64 *ctx)
{
	u64 now = bpf_ktime_get_ns(), result;
	struct phases *phases = mine(KIND_REPLACE);

	if (!phases)
		return 0;
	KPT_FIELD(u64, result, ctx, RESULT);
	if ((u32)result)
		phases->flags |= FLAG_REFUSED;
	end(KIND_REPLACE, now);
	return 0;
}

/* xt_replace_table(table, ...), also called where a table is first made: the last one counts. */
int swap_enter(u64 *ctx)
{
	inner_enter(KIND_REPLACE);
	return 0;
}

int swap_leave(u64 *ctx)
{
	struct phases *phases = mine(KIND_REPLACE);
	u64 result;

	if (!phases || !phases->mark_ns)
		return 0;
	phases->commit_ns = bpf_ktime_get_ns() - phases->mark_ns;
	KPT_FIELD(u64, result, ctx, RESULT);
	phases->flags = result ? FLAG_REPLACED : 0;
	return 0;
}
