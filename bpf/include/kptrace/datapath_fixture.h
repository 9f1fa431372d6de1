// SPDX-License-Identifier: GPL-2.0-only
/* Keys and values of Cilium's maps, as far as the experiments' own datapath uses them: experiments/cilium_layouts.py has
 * the sizes. Addresses, ports and rev_nat_index are in network order. */
#ifndef KPTRACE_DATAPATH_FIXTURE_H
#define KPTRACE_DATAPATH_FIXTURE_H

struct lb4_key {
	u32 address;
	u16 port, slot;
	u8 protocol, scope, pad[2];
};

struct lb6_key {
	u32 address[4];
	u16 port, slot;
	u8 protocol, scope, pad[2];
};

struct lb_service {
	u32 backend_id; /* of a slot from 1 on */
	u16 count, rev_nat_index;
	u8 flags, flags2;
	u16 inactive;
};

/* How every version begins; maps of older agents have shorter values, of newer ones longer. */
struct lb4_backend {
	u32 address;
	u16 port;
};

struct lb6_backend {
	u32 address[4];
	u16 port;
};

struct reverse4 {
	u32 address;
	u16 port;
} __attribute__((packed));

struct socket4_key {
	u64 cookie;
	u32 address;
	u16 port, pad;
};

struct socket4_value {
	u32 address;
	u16 port, rev_nat_index;
};

struct socket6_key {
	u64 cookie;
	u32 address[4];
	u32 port;
	u32 pad;
};

struct socket6_value {
	u32 address[4];
	u16 port, rev_nat_index;
};

struct ct4_key {
	u32 daddr, saddr;
	u16 dport, sport;
	u8 protocol, flags;
} __attribute__((packed));

struct ct_entry {
	u64 reserved, backend_id, packets, bytes;
	u32 lifetime;
	u16 bits, rev_nat_index, nat_port;
	u8 tx_flags, rx_flags;
	u32 source_identity, last_tx, last_rx;
};

struct metric_key {
	u8 reason, direction;
	u16 line;
	u8 file, reserved[3];
};

struct metric {
	u64 count, bytes;
};

/* struct metric_key, direction and file (of Cilium's sources) */
enum { INGRESS = 1, EGRESS, SERVICE };
enum { FILE_HOST = 1, FILE_LXC, FILE_OVERLAY, FILE_XDP, FILE_SOCK };

#define REASON_FORWARDED 0
#define REASON_NO_SLOT 5
#define REASON_NO_BACKEND 6
#define DROP_INVALID 134
#define DROP_MISSED_TAIL_CALL 140
#define DROP_WRITE_ERROR 141
#define DROP_CT_FULL 155
#define DROP_NO_SERVICE 158

#define SERVICE_EXTERNAL_IP 1 /* struct lb_service, flags */
#define SERVICE_NODEPORT 2
#define SERVICE_LOADBALANCER 32
#define CT_SERVICE 4 /* struct ct4_key, flags */

/* Whether keys have the protocol: kernel/bytecode.py, CONSTANT_BASE. */
#define HOLE_PROTOCOL_IN_KEYS 0

#endif
