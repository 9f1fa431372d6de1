// SPDX-License-Identifier: GPL-2.0-only
/* What a process asks nfnetlink for by itself: dumps of rules and of connections, and the deletion of connections. */
#ifndef KPTRACE_REWRITE_REQUESTS_H
#define KPTRACE_REWRITE_REQUESTS_H

#include <kptrace/rewrite_copy.h>

#define NLM_F_DUMP 0x300
#define SUBSYSTEM_CTNETLINK 1
#define SUBSYSTEM_NFTABLES 10
#define CT_DELETE (SUBSYSTEM_CTNETLINK << 8 | 2)

/* Requests with less between them are one span: kube-proxy deletes its stale connections one by one. */
#define REQUEST_JOIN_NS 5000000
#define REQUEST_HEADER_BYTES 20

/* What the message there asks for, 0 if it is nothing of interest. */
static __always_inline u32 requested(u64 base, u64 length)
{
	struct { /* struct nlmsghdr, and struct nfgenmsg behind it */
		u32 length;
		u16 type;
		u16 flags;
		u32 sequence;
		u32 port;
		u8 family;
		u8 version;
		u16 resource;
	} header = {};
	u32 subsystem;

	if (length < REQUEST_HEADER_BYTES || kpt_read_user(&header, sizeof(header), (void *)base))
		return 0;
	subsystem = header.type >> 8;
	if (subsystem != SUBSYSTEM_NFTABLES && subsystem != SUBSYSTEM_CTNETLINK)
		return 0;
	if ((header.flags & NLM_F_DUMP) != NLM_F_DUMP && header.type != CT_DELETE)
		return 0;
	return subsystem << 8 | header.family;
}

/* The same of an array of iovecs, where the first one holds the message's header. */
static __always_inline u32 vector_requested(u64 base, u64 count)
{
	struct user_vector vector = {};

	if (!count || kpt_read_user(&vector, sizeof(vector), (void *)base))
		return 0;
	return requested(vector.base, vector.length);
}

#endif
