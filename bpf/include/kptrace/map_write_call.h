// SPDX-License-Identifier: GPL-2.0-only
/* A bpf(2) call: its attributes in the caller's memory, and the objects in the kernel that it is for. */
#ifndef KPTRACE_MAP_WRITE_CALL_H
#define KPTRACE_MAP_WRITE_CALL_H

#include <kptrace/map_write.h>
#include <kptrace/task.h>

/* enum bpf_cmd */
#define MAP_UPDATE_ELEM 2
#define MAP_DELETE_ELEM 3
#define PROG_LOAD 5
#define PROG_ATTACH 8
#define PROG_DETACH 9
#define MAP_LOOKUP_AND_DELETE_ELEM 21
#define MAP_LOOKUP_AND_DELETE_BATCH 25
#define MAP_UPDATE_BATCH 26
#define MAP_DELETE_BATCH 27
#define LINK_CREATE 28
#define LINK_UPDATE 29
#define LINK_DETACH 34
#define COMMANDS 64

#define KPT_BIT(number) (1ULL << (number))
#define WRITES                                                                                       \
	(KPT_BIT(MAP_UPDATE_ELEM) | KPT_BIT(MAP_DELETE_ELEM) | KPT_BIT(MAP_LOOKUP_AND_DELETE_ELEM) | \
	 KPT_BIT(MAP_LOOKUP_AND_DELETE_BATCH) | KPT_BIT(MAP_UPDATE_BATCH) | KPT_BIT(MAP_DELETE_BATCH))
#define BATCHES (KPT_BIT(MAP_LOOKUP_AND_DELETE_BATCH) | KPT_BIT(MAP_UPDATE_BATCH) | KPT_BIT(MAP_DELETE_BATCH))
#define UPDATES (KPT_BIT(MAP_UPDATE_ELEM) | KPT_BIT(MAP_UPDATE_BATCH))
#define REPLACEMENTS                                                                               \
	(KPT_BIT(PROG_LOAD) | KPT_BIT(PROG_ATTACH) | KPT_BIT(PROG_DETACH) | KPT_BIT(LINK_CREATE) | \
	 KPT_BIT(LINK_UPDATE) | KPT_BIT(LINK_DETACH))
#define TYPE_PROG_ARRAY 3
#define ATTRIBUTE_BYTES 64

static __always_inline int is_in(u64 commands, u32 command)
{
	return command < COMMANDS && (commands >> command) & 1;
}

/* The parts of union bpf_attr that matter here. */
union call_attributes {
	struct {
		u32 map;
		u32 zero;
		u64 key;
		u64 value;
	} element;
	struct {
		u64 in;
		u64 out;
		u64 keys;
		u64 values;
		u32 count;
		u32 map;
	} batch;
	struct {
		u32 words[12];
		u64 name[2];
	} program;
};

/* What is behind one of the caller's descriptors, of whatever type: the map or program, if the call succeeds. */
static __always_inline u64 object_of(u32 descriptor)
{
	u64 file = task_file(descriptor), object;

	KPT_FOLLOW(u64, object, file, KPT_FILE, KPT_FILE_PRIVATE);
	return object;
}

static __always_inline void describe_program(struct write_started *started, u32 descriptor)
{
	u64 program = object_of(descriptor), extra, word;
	u32 number;

	KPT_FOLLOW(u64, extra, program, KPT_PROGRAM, KPT_PROGRAM_EXTRA);
	KPT_FOLLOW(u32, number, extra, KPT_EXTRA, KPT_EXTRA_ID);
	started->object = number;
	KPT_WORD(word, extra + KPT_EXTRA_NAME, 0);
	started->name[0] = word;
	KPT_WORD(word, extra + KPT_EXTRA_NAME, 1);
	started->name[1] = word;
}

static __always_inline void resolve_program(struct write_started *started, union call_attributes *call)
{
	started->kind = WRITE_PROGRAM;
	if (started->command == PROG_LOAD) {
		started->name[0] = call->program.name[0];
		started->name[1] = call->program.name[1];
	} else if (started->command == LINK_CREATE) {
		describe_program(started, call->program.words[0]);
	} else if (started->command != LINK_DETACH) {
		describe_program(started, call->program.words[1]);
	}
}

/* A tail call's new target: the maps that hold these are made anew too often to be known by their ids. */
static __always_inline void resolve_target(struct write_started *started, u64 map)
{
	u64 word;

	started->kind = WRITE_PROGRAM;
	KPT_WORD(word, map + KPT_MAP_NAME, 0);
	started->name[0] = word;
	KPT_WORD(word, map + KPT_MAP_NAME, 1);
	started->name[1] = word;
}

#endif
