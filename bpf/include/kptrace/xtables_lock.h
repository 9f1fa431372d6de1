// SPDX-License-Identifier: GPL-2.0-only
/* Layout of what travels to user space: signals/xtables_lock_records.py has the same. */
#ifndef KPTRACE_XTABLES_LOCK_H
#define KPTRACE_XTABLES_LOCK_H

#include <kptrace/task.h>

enum { LOCK_TAKEN = 1, LOCK_RELEASED = 2 };
enum { LOST_RING_FULL, LOST_WAITS_FULL, LOST_HOLDS_FULL, LOST_KINDS = 4 };

/* One process and the lock file: while it waits, while it holds, and in the records of both. */
struct lock_state {
	u32 kind;
	u32 tgid;
	u32 tid;
	u32 netns;
	u64 file; /* address of the struct file: an open file description owns a lock, not a process */
	u64 inode;
	u32 device;
	u32 parents[KPT_PARENTS];
	u32 zero;
	u64 begin_ns; /* waiting: the first attempt; holding: the return of the flock() that took it */
	u64 end_ns;   /* of the wait, or of the hold; of an attempt that failed, 0 while one is under way */
};

/* Attempts that failed and are repeated, as iptables before 1.8 and kube-proxy do, are one wait. */
struct attempt_key {
	u64 file;
	u32 tgid;
	u32 zero;
};

#endif
