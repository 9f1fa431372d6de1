// SPDX-License-Identifier: GPL-2.0-only
/* An IPv4 packet of TCP or UDP as the experiments' datapath reads and rewrites it: no options, no fragments. */
#ifndef KPTRACE_DATAPATH_PACKET_H
#define KPTRACE_DATAPATH_PACKET_H

#define ETH_BYTES 14
#define IP_PROTOCOL_AT (ETH_BYTES + 9)
#define IP_CHECK_AT (ETH_BYTES + 10)
#define IP_SADDR_AT (ETH_BYTES + 12)
#define IP_DADDR_AT (ETH_BYTES + 16)
#define SPORT_AT (ETH_BYTES + 20)
#define DPORT_AT (ETH_BYTES + 22)
#define TCP_CHECK_AT (ETH_BYTES + 20 + 16)
#define UDP_CHECK_AT (ETH_BYTES + 20 + 6)
#define ETHERTYPE_IP 0x0008 /* in network order, on the little-endian machines that kptrace runs on */
#define PLAIN_IP 0x45
#define FRAGMENT 0xff3f /* more to come, or an offset; in network order */
#define TCP 6
#define UDP 17

struct flow {
	u32 saddr, daddr;
	u16 sport, dport;
	u8 protocol;
};

struct target {
	u32 address;
	u16 port, rev_nat_index;
};

/* Any function that spreads; the kernel's random numbers would make runs differ. */
static __always_inline u32 hash(struct flow *flow)
{
	u32 value = flow->saddr ^ (flow->daddr << 7) ^ ((u32)flow->sport << 16 | flow->dport);

	value = (value ^ value >> 16) * 0x85ebca6b;
	value = (value ^ value >> 13) * 0xc2b2ae35;
	return value ^ value >> 16;
}

static __always_inline int read_flow(struct __sk_buff *skb, struct flow *flow)
{
	u8 version;
	u16 fragment;

	if (skb->protocol != ETHERTYPE_IP || bpf_skb_load_bytes(skb, ETH_BYTES, &version, 1) || version != PLAIN_IP)
		return -1;
	if (bpf_skb_load_bytes(skb, ETH_BYTES + 6, &fragment, 2) || fragment & FRAGMENT)
		return -1;
	if (bpf_skb_load_bytes(skb, IP_PROTOCOL_AT, &flow->protocol, 1) ||
	    (flow->protocol != TCP && flow->protocol != UDP))
		return -1;
	return bpf_skb_load_bytes(skb, IP_SADDR_AT, flow, 12); /* both addresses and both ports, in this order */
}

static __always_inline long rewrite(struct __sk_buff *skb, struct flow *flow, struct target *to, u32 address_at,
				    u32 old_address, u32 port_at, u16 old_port)
{
	u32 check_at = flow->protocol == TCP ? TCP_CHECK_AT : UDP_CHECK_AT;
	u64 unset = flow->protocol == UDP ? BPF_F_MARK_MANGLED_0 : 0; /* a datagram may have no checksum */

	return bpf_l4_csum_replace(skb, check_at, old_address, to->address, 4 | BPF_F_PSEUDO_HDR | unset) ||
	       bpf_l4_csum_replace(skb, check_at, old_port, to->port, 2 | unset) ||
	       bpf_l3_csum_replace(skb, IP_CHECK_AT, old_address, to->address, 4) ||
	       bpf_skb_store_bytes(skb, address_at, &to->address, 4, 0) ||
	       bpf_skb_store_bytes(skb, port_at, &to->port, 2, 0);
}

/* RFC 1624, eqn. 3, for a field of a packet whose checksum is the one's complement of its sum. */
static __always_inline u16 adjusted(u16 check, u32 old_address, u32 address, u16 old_port, u16 port)
{
	u32 sum = (u16)~check;

	sum += (u16)~old_address + (u16) ~(old_address >> 16) + (u16)address + (u16)(address >> 16);
	sum += (u16)~old_port + port;
	sum = (sum & 0xffff) + (sum >> 16);
	return ~((sum & 0xffff) + (sum >> 16));
}

#endif
