// SPDX-License-Identifier: GPL-2.0-only
/* What a transaction's socket tells: whether it is netfilter's, its namespace and ruleset, and the answers queued on it. */
#ifndef KPTRACE_REWRITE_SOCKET_H
#define KPTRACE_REWRITE_SOCKET_H

#include <kptrace/task.h>

#define AF_NETLINK 16
#define NETLINK_NETFILTER 12
#define NLMSG_ERROR 2
#define ANSWERS 16

static __always_inline int is_netfilter(u64 sk)
{
	u64 family, protocol;

	KPT_FOLLOW(u16, family, sk, KPT_SOCK, KPT_SOCK_FAMILY);
	if (family != AF_NETLINK)
		return 0;
	KPT_FOLLOW(u16, protocol, sk, KPT_SOCK, KPT_SOCK_PROTOCOL);
	return protocol == NETLINK_NETFILTER;
}

static __always_inline u32 netns_of(u64 sk)
{
	u64 net, inode;

	KPT_FOLLOW(u64, net, sk, KPT_SOCK, KPT_SOCK_NET);
	KPT_FOLLOW(u32, inode, net, KPT_NET, KPT_NET_INUM);
	return inode;
}

/* Moves with every commit in the socket's namespace: the generation itself, or (before v6.17) one bit of it. */
static __always_inline u32 sequence_of(u64 sk)
{
	u64 net, sequence = 0;

	KPT_FOLLOW(u64, net, sk, KPT_SOCK, KPT_SOCK_NET);
#if defined(KPT_NET_BASE_SEQ)
	KPT_FOLLOW(u32, sequence, net, KPT_NET, KPT_NET_BASE_SEQ);
#elif defined(KPT_NET_GENCURSOR)
	KPT_FOLLOW(u8, sequence, net, KPT_NET, KPT_NET_GENCURSOR);
#endif
	return sequence;
}

static __always_inline u32 queued_on(u64 sk)
{
	u64 count;

	KPT_FOLLOW(u32, count, sk, KPT_SOCK, KPT_SOCK_QUEUE_LENGTH);
	return count;
}

/* The newest error among the messages that were queued on the sender's socket meanwhile; older ones may wait there too. */
static __always_inline s32 queued_error(u64 sk, u32 answers)
{
	u64 message, data, head, code;

	KPT_FOLLOW(u64, message, sk, KPT_SOCK, KPT_SOCK_QUEUE_LAST);
#pragma unroll
	for (int i = 0; i < ANSWERS; i++) {
		/* Keeps clang from making one bound of two, by whose `!=` the verifier sees no end. */
		asm volatile("" : "+r"(answers));
		if (i >= answers)
			break;
		KPT_FOLLOW(u64, data, message, KPT_SKB, KPT_SKB_DATA);
		KPT_WORD(head, data, 0);
		KPT_WORD(code, data, 2);
		if (((head >> 32) & 0xffff) == NLMSG_ERROR && (s32)code < 0)
			return (s32)code;
		KPT_FOLLOW(u64, message, message, KPT_SKB, KPT_SKB_PREV);
	}
	return 0;
}

#endif
