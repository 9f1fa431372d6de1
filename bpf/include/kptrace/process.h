// SPDX-License-Identifier: GPL-2.0-only
/* Layout of what travels to user space: signals/process_records.py has the same. */
#ifndef KPTRACE_PROCESS_H
#define KPTRACE_PROCESS_H

#include <kptrace/task.h>

#define PROCESS_COMM_BYTES 16
#define PROCESS_NAME_WORDS 16
#define PROCESS_ARGUMENT_BYTES 128

enum { PROCESS_EXEC = 1, PROCESS_EXIT = 2 };
enum { PROCESS_LOST_RING_FULL, PROCESS_LOST_KINDS };

struct exec_record {
	u32 kind;
	u32 tgid;
	u64 at_ns;
	u64 cgroup;
	u32 parents[KPT_PARENTS];
	u32 netns;
	u32 mntns;
	u32 copied; /* bytes of arguments; 0 if it is no tool that reads or writes rules, or they cannot be read */
	u32 zero;
	char comm[PROCESS_COMM_BYTES];
	u64 name[PROCESS_NAME_WORDS];
	u8 arguments[PROCESS_ARGUMENT_BYTES]; /* only there where `copied` is not 0 */
};

struct exit_record {
	u32 kind;
	u32 tgid;
	u64 at_ns;
	u32 status; /* as wait(2) has it */
	u32 zero;
};

#endif
