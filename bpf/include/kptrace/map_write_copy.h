// SPDX-License-Identifier: GPL-2.0-only
/* The record of a bpf(2) call that has returned, with the bounded copy of its entries. */
#ifndef KPTRACE_MAP_WRITE_COPY_H
#define KPTRACE_MAP_WRITE_COPY_H

#include <kptrace/map_write_call.h>

/* Append bytes from the user's memory to the record; returns bytes in the buffer. */
static __always_inline u64 append_entries(struct write_record *record, u64 at, u64 base, u64 size)
{
	asm volatile("%0 &= 4095" : "+r"(at));
	asm volatile("%0 &= 8191" : "+r"(size));
	/* Alone, as in rewrite_copy.h. */
	if (size > ENTRY_BYTES)
		return at;
	if (kpt_read_user(&record->data[at], size, (void *)base)) {
		record->head.flags |= WRITE_UNREAD;
		return at;
	}
	return at + size;
}

/* What the kernel says of a batch: how many of its entries it did. */
static __always_inline u32 batch_done(struct write_started *started)
{
	union call_attributes call = {};

	if (started->attribute_bytes < sizeof(call.batch) ||
	    kpt_read_user(&call, sizeof(call.batch), (void *)started->attributes))
		return 0;
	return call.batch.count;
}

static __always_inline u64 copy_entries(struct write_record *record, struct write_started *started)
{
	u64 count = started->flags & WRITE_BATCH ? record->head.done : 1, size;

	if (started->kind != WRITE_MAP)
		return 0;
	if (count > started->most)
		count = started->most;
	size = append_entries(record, 0, started->keys, count * started->key_size);
	if (started->flags & WRITE_VALUES)
		size = append_entries(record, size, started->values, count * started->value_bytes);
	if (record->head.flags & WRITE_UNREAD)
		return 0;
	record->head.copied = count;
	return size;
}

static __always_inline void fill_head(struct write_head *head, struct write_started *started)
{
	u64 id = bpf_get_current_pid_tgid();

	head->kind = started->kind;
	head->command = started->command;
	head->begin_ns = started->begin_ns;
	head->tgid = id >> 32;
	head->tid = id;
	head->flags = started->flags;
	head->number = started->number;
	head->object = started->object;
	head->asked = started->asked;
	head->done = started->flags & WRITE_BATCH ? batch_done(started) : 0;
	head->copied = 0;
	head->key_size = started->key_size;
	head->value_bytes = started->flags & WRITE_VALUES ? started->value_bytes : 0;
	head->name[0] = started->name[0];
	head->name[1] = started->name[1];
}

#endif
