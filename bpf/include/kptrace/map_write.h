// SPDX-License-Identifier: GPL-2.0-only
/* Layout of what travels to and from user space: signals/map_write_records.py and map_write_kernel.py have the same. */
#ifndef KPTRACE_MAP_WRITE_H
#define KPTRACE_MAP_WRITE_H

#define ENTRY_BYTES 4096
#define OBJECT_NAME_BYTES 16

enum { WRITE_MAP = 1, WRITE_PROGRAM = 2 };
enum { WRITE_UNSURE = 1, WRITE_UNREAD = 2, WRITE_BATCH = 4, WRITE_VALUES = 8 };
enum { ROLE_AGENT = 1, ROLE_SELF = 2 };
enum { LOST_RING_FULL, LOST_RUNNING_FULL, LOST_UNREADABLE, LOST_KINDS = 4 };

/* What is expected of a map of this id. */
struct watched_map {
	u32 number;
	u32 type;
	u32 key_size;
	u32 value_size;
	u32 value_bytes; /* of an entry in the caller's memory: all CPUs' values */
	u32 most;	 /* so many entries fit ENTRY_BYTES, keys and values */
};

/* A call between its entry and its exit. */
struct write_started {
	u64 begin_ns;
	u64 attributes; /* the caller's union bpf_attr */
	u64 keys;
	u64 values;
	u32 attribute_bytes;
	u32 command;
	u32 kind;
	u32 flags;
	u32 number;
	u32 object; /* id of the map or program */
	u32 key_size;
	u32 value_bytes;
	u32 most;
	u32 asked;
	u64 name[2];
};

struct write_head {
	u32 kind;
	u32 command;
	u64 begin_ns;
	u64 end_ns;
	s64 result;
	u32 tgid;
	u32 tid;
	u32 flags;
	u32 number; /* as user space calls the map */
	u32 object; /* id of the map or program, 0 where nobody said */
	u32 asked;  /* entries that the call was for */
	u32 done;   /* by the kernel's own count, of batches only */
	u32 copied; /* entries that follow: all their keys, then all their values */
	u32 key_size;
	u32 value_bytes;
	u64 name[2];
};

struct write_record {
	struct write_head head;
	u8 data[2 * ENTRY_BYTES]; /* the upper half only lets the verifier see that no copy leaves the buffer */
};

#endif
