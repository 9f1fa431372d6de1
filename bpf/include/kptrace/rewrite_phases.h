// SPDX-License-Identifier: GPL-2.0-only
/* Layout of what travels to user space: signals/rewrite_phases_records.py has the same. */
#ifndef KPTRACE_REWRITE_PHASES_H
#define KPTRACE_REWRITE_PHASES_H

#define HEAD_WORDS 32

enum { KIND_BATCH = 1, KIND_REPLACE = 2, KIND_DESTROY = 3, KIND_TEARDOWN = 4 };
enum { FLAG_COMMITTED = 1, FLAG_ABORTED = 2, FLAG_REPLACED = 4, FLAG_REFUSED = 8 };
enum { LOST_RING_FULL, LOST_RUNNING_FULL, LOST_KINDS = 4 };

/* One function's run and what ran inside it; also what is kept while it runs. */
struct phases {
	u32 kind;
	u32 flags;
	u32 tgid;
	u32 portid; /* the sender's netlink socket */
	u64 begin_ns;
	u64 end_ns;
	u64 mark_ns;   /* when the inner function began, the last one of them for a replacement */
	u64 commit_ns; /* time in nf_tables_commit(), or in xt_replace_table() */
	u64 abort_ns;
	u64 runs;    /* of the destroy worker, when the commit began */
	u64 message; /* address of the batch's first message */
	u32 size;    /* bytes of the batch from there on */
	u32 zero;
};

struct phases_record {
	struct phases phases;
	u64 head[HEAD_WORDS]; /* the batch's first bytes: the table's name is among them */
};

struct flight {
	u64 work; /* address of the destroy worker's work */
	u64 runs; /* of the worker */
	u64 ours; /* whether the watched namespace left something for its next run */
};

#endif
