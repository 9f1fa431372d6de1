// SPDX-License-Identifier: GPL-2.0-only
/* A transaction in its sender's memory: whether it is a batch, and the bounded copy of it that a record carries. */
#ifndef KPTRACE_REWRITE_COPY_H
#define KPTRACE_REWRITE_COPY_H

#include <kptrace/rewrite.h>

#define BATCH_BEGIN 0x10
#define REPLACE_BYTES 92 /* struct ipt_replace up to num_counters, the same for both families */
#define VECTORS 4

struct user_vector {
	u64 base;
	u64 length;
};

struct user_message { /* the start of struct user_msghdr, and of struct mmsghdr */
	u64 name;
	u64 name_length;
	u64 vectors;
	u64 count;
};

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

/* Of what was copied at the exit, where it was no certainty at the entry. */
static __always_inline int still_no_batch(struct rewrite_record *record, u64 copied)
{
	u32 *words = (u32 *)record->data;

	return copied < 8 || (words[1] & 0xffff) != BATCH_BEGIN;
}

#endif
