// SPDX-License-Identifier: GPL-2.0-only
/* Which Service a packet is for: its destination address, port and protocol, read through a dynptr. */
#ifndef KPTRACE_SERVICE_H
#define KPTRACE_SERVICE_H

#include <kptrace/types.h>

struct service_key4 {
	u32 address;
	u16 port;
	u8 protocol;
	u8 zero;
};

struct service_key6 {
	u64 address[2];
	u16 port;
	u8 protocol;
	u8 zero[5];
};

#define SERVICE_SLOTS 8

struct service_hist {
	u64 slots[SERVICE_SLOTS];
	u64 sum;
};

/* The exposed edges are 2^9 .. 2^13, 2^15, 2^18 ns and infinity: kernel/histogram.py, SERVICE_LADDER_NS. */
static __always_inline u32 service_slot(u64 duration_ns)
{
	u64 value = duration_ns ? duration_ns - 1 : 0;

	if (value < 1 << 9)
		return 0;
	if (value < 1 << 10)
		return 1;
	if (value < 1 << 11)
		return 2;
	if (value < 1 << 12)
		return 3;
	if (value < 1 << 13)
		return 4;
	if (value < 1 << 15)
		return 5;
	return value < 1 << 18 ? 6 : 7;
}

struct dynptr {
	u64 opaque[2];
} __attribute__((aligned(8)));

static long (*dynptr_from_skb)(u64 skb, u64 flags, struct dynptr *to) = (void *)0x7fff0001; /* kfunc 0 */
static long (*dynptr_read)(void *to, u32 size, struct dynptr *from, u32 offset, u64 flags) = (void *)201;

/* Both return 0 and fill the key, or a negative value: no port to be seen. */
static __always_inline int service_read4(struct dynptr *packet, struct service_key4 *key)
{
	u32 ports, words[5];

	if (dynptr_read(words, sizeof(words), packet, 0, 0))
		return -1;
	if (((u16 *)words)[3] & 0xff1f) /* a later fragment, as read by a little-endian CPU */
		return -1;
	if (dynptr_read(&ports, sizeof(ports), packet, (((u8 *)words)[0] & 15) * 4, 0))
		return -1;
	key->address = words[4];
	key->port = ports >> 16;
	key->protocol = ((u8 *)words)[9];
	return 0;
}

/* Only where the transport header follows at once: an extension header before it is not looked behind. */
static __always_inline int service_read6(struct dynptr *packet, struct service_key6 *key)
{
	u64 words[5];
	u32 ports;

	if (dynptr_read(words, sizeof(words), packet, 0, 0) || dynptr_read(&ports, sizeof(ports), packet, 40, 0))
		return -1;
	key->address[0] = words[3];
	key->address[1] = words[4];
	key->port = ports >> 16;
	key->protocol = ((u8 *)words)[6];
	return 0;
}

#endif
