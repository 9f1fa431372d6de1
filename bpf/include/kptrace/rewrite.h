// SPDX-License-Identifier: GPL-2.0-only
/* Layout of what travels to user space: signals/rewrite_records.py, rewrite_kernel.py and rewrite_requests_records.py have
 * the same. */
#ifndef KPTRACE_REWRITE_H
#define KPTRACE_REWRITE_H

#include <kptrace/task.h>

#define COPY_BYTES 4096
#define TAIL_BYTES 20
#define COMM_BYTES 16

enum { KIND_FLAT = 1, KIND_VECTOR = 2, KIND_REPLACE4 = 3, KIND_REPLACE6 = 4, KIND_REQUESTS = 5 };
enum { FLAG_UNSURE = 1, FLAG_UNREAD = 2, FLAG_SEVERAL = 4, FLAG_TAIL = 8, FLAG_OVERLAP = 16 };
enum { LOST_RING_FULL, LOST_RUNNING_FULL, LOST_UNREADABLE, LOST_REQUESTS_FULL, LOST_KINDS };

struct flight {
	u64 starts; /* transactions that ever began */
	u64 running;
};

/* A transaction between its syscall's entry and exit. */
struct started {
	u64 begin_ns;
	u64 sk;
	u64 base;  /* the user's buffer, or its array of iovecs */
	u64 count; /* bytes, or iovecs */
	u64 starts;
	u32 kind;
	u32 flags;
	u32 sequence;
	u32 queued;
	u32 netns;
	u32 zero;
};

struct rewrite_head {
	u32 kind;
	u32 tgid;
	u32 tid;
	u32 flags;
	u64 begin_ns;
	u64 end_ns;
	s64 result;
	u64 cgroup;
	u32 netns; /* the socket's */
	u32 task_netns;
	u32 mntns;
	u32 sequence_begin;
	u32 sequence_end;
	u32 queued_begin;
	u32 queued_end;
	s32 error; /* of the newest NLMSG_ERROR with one, or 0 */
	u32 parents[KPT_PARENTS];
	char comm[COMM_BYTES];
	u32 size; /* as the caller gave it where it is not a vector */
	u8 tail[TAIL_BYTES];
	u32 copied;
	u32 zero;
};

struct rewrite_record {
	struct rewrite_head head;
	u8 data[2 * COPY_BYTES]; /* the upper half only lets the verifier see that no copy leaves the buffer */
};

/* Whose, in which namespace, and what: the subsystem and the address family that the requests named. */
struct request_key {
	u32 tgid;
	u32 netns; /* the socket's */
	u32 what;  /* subsystem << 8 | family */
	u32 zero;
};

/* From the first request's entry to that of the last receive of an answer, or of the last request. */
struct request_span {
	u64 begin_ns;
	u64 last_ns;
	u64 requests;
};

struct request_record {
	u32 kind; /* KIND_REQUESTS */
	u32 zero;
	struct request_key key;
	struct request_span span;
};

#endif
