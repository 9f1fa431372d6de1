// SPDX-License-Identifier: GPL-2.0-only
/* Which programs begin and end, for the names of writers and for the phases of their runs.
 *
 * Of a tool that reads or writes rules the first bytes of its arguments travel along; of no other program do they leave
 * the kernel: they may hold secrets. There is no record of forks: they are many more, and an exec's record has its four
 * ancestors as the kernel has them. Nobody is woken: records are read with the next rewrite or the next tick.
 */
#include <linux/types.h>
#include <kptrace/process.h>
#include <kptrace/task.h>

#define RING_PAGES 128
#define NO_WAKEUP 1

BPF_F_TABLE("array", u32, u64, lost, PROCESS_LOST_KINDS, KPT_F_MMAPABLE);
BPF_RINGBUF_OUTPUT(processes, RING_PAGES);

static __always_inline void lose(u32 kind)
{
	u64 *value = lost.lookup(&kind);

	if (value)
		__sync_fetch_and_add(value, 1);
}

#define BYTES(a, b, c, d, e, f) \
	((u64)(a) | (u64)(b) << 8 | (u64)(c) << 16 | (u64)(d) << 24 | (u64)(e) << 32 | (u64)(f) << 40)

/* nft, iptables*, ip6tables*, xtables-*-multi, conntrack: a filter of what is copied, nothing is decided by it. */
static __always_inline int is_tool(u64 name)
{
	u64 six = name & 0xffffffffffff;

	return (u32)name == BYTES('n', 'f', 't', 0, 0, 0) || six == BYTES('i', 'p', 't', 'a', 'b', 'l') ||
	       six == BYTES('i', 'p', '6', 't', 'a', 'b') || six == BYTES('x', 't', 'a', 'b', 'l', 'e') ||
	       six == BYTES('c', 'o', 'n', 'n', 't', 'r');
}

static __always_inline u32 copy_arguments(struct exec_record *record, u64 task)
{
	u64 mm, start, end, size;

	KPT_FOLLOW(u64, mm, task, KPT_TASK, KPT_TASK_MM);
	KPT_FOLLOW(u64, start, mm, KPT_MM, KPT_MM_ARG_START);
	KPT_FOLLOW(u64, end, mm, KPT_MM, KPT_MM_ARG_END);
	size = end - start;
	/* Keeps clang from making another test of this one, by which the verifier sees no bound. */
	asm volatile("" : "+r"(size));
	if (size > PROCESS_ARGUMENT_BYTES)
		size = PROCESS_ARGUMENT_BYTES;
	if (size == 0 || kpt_read_user(record->arguments, size, (void *)start))
		return 0;
	return size;
}

/* sched_process_exec(task, old_pid, binprm) */
int process_exec(u64 *ctx)
{
	u64 binary, name, value, task = bpf_get_current_task();
	struct exec_record record = {};
	long failed;

	record.kind = PROCESS_EXEC;
	record.tgid = bpf_get_current_pid_tgid() >> 32;
	record.at_ns = bpf_ktime_get_ns();
	record.cgroup = bpf_get_current_cgroup_id();
	record.netns = task_netns(task);
	record.mntns = task_mntns(task);
	task_parents(task, record.parents);
	bpf_get_current_comm(record.comm, sizeof(record.comm));
	KPT_LOAD64(binary, ctx, 16);
	KPT_FOLLOW(u64, name, binary, KPT_BINPRM, KPT_BINPRM_FILENAME);
#pragma unroll
	for (int i = 0; i < PROCESS_NAME_WORDS; i++) {
		KPT_WORD(value, name, i);
		record.name[i] = value;
	}
	if (is_tool(*(u64 *)record.comm))
		record.copied = copy_arguments(&record, task);
	if (record.copied)
		failed = processes.ringbuf_output(&record, sizeof(record), NO_WAKEUP);
	else
		failed = processes.ringbuf_output(&record, sizeof(record) - PROCESS_ARGUMENT_BYTES, NO_WAKEUP);
	if (failed)
		lose(PROCESS_LOST_RING_FULL);
	return 0;
}

/* sched_process_exit(task, ...), called for every thread: the first one's end is taken for the process's. */
int process_exit(u64 *ctx)
{
	u64 status, id = bpf_get_current_pid_tgid();
	struct exit_record record = {};

	if (id >> 32 != (u32)id)
		return 0;
	record.kind = PROCESS_EXIT;
	record.tgid = id;
	record.at_ns = bpf_ktime_get_ns();
	KPT_FOLLOW(u32, status, bpf_get_current_task(), KPT_TASK, KPT_TASK_EXIT_CODE);
	record.status = status;
	if (processes.ringbuf_output(&record, sizeof(record), NO_WAKEUP))
		lose(PROCESS_LOST_RING_FULL);
	return 0;
}
