// SPDX-License-Identifier: GPL-2.0-only
/* A small datapath with the names and map layouts of Cilium's, for experiments and tests: IPv4 at tc and at XDP.
 *
 * A packet to a Service: find the Service, choose a back end (or find the connection's), remember the connection, rewrite
 * the destination. A packet back: find the connection, rewrite the source. The maps here only stand for those that the
 * experiment makes: experiments/cilium_layouts.py, MapName.
 */
#include <linux/types.h>
#include <kptrace/types.h>
#include <kptrace/datapath_fixture.h>
#include <kptrace/datapath_packet.h>

#define TAIL_FROM_CONTAINER 7 /* CILIUM_CALL_IPV4_FROM_LXC */
#define TAIL_TO_CONTAINER 13  /* CILIUM_CALL_IPV4_TO_ENDPOINT */
#define EXTERNAL (SERVICE_EXTERNAL_IP | SERVICE_NODEPORT | SERVICE_LOADBALANCER)

enum { TC_OK = 0, TC_SHOT = 2 };
enum { XDP_CODE_DROP = 1, XDP_CODE_PASS = 2 };

BPF_TABLE("hash", struct lb4_key, struct lb_service, services4, 1);
BPF_TABLE("hash", u32, struct lb4_backend, backends4, 1);
BPF_TABLE("hash", u16, struct reverse4, reverse_nat4, 1);
BPF_TABLE("lru_hash", struct ct4_key, struct ct_entry, ct4, 1);
BPF_TABLE("lru_hash", struct ct4_key, struct ct_entry, ct_any4, 1);
BPF_TABLE("percpu_hash", struct metric_key, struct metric, metrics, 1);
BPF_PROG_ARRAY(calls, 50);

static __always_inline void account(u8 reason, u8 direction, u8 file, u16 line, u64 bytes)
{
	struct metric_key key = {.reason = reason, .direction = direction, .line = line, .file = file};
	struct metric first = {1, bytes}, *metric = metrics.lookup(&key);

	if (metric) {
		metric->count++;
		metric->bytes += bytes;
	} else {
		metrics.update(&key, &first);
	}
}

static __always_inline struct ct_entry *connection(struct ct4_key *key)
{
	if (key->protocol == TCP)
		return ct4.lookup(key);
	return ct_any4.lookup(key);
}

static __always_inline long connect_to(struct ct4_key *key, u64 backend_id, u16 rev_nat_index)
{
	struct ct_entry entry = {.backend_id = backend_id, .packets = 1, .rev_nat_index = rev_nat_index};

	entry.lifetime = bpf_ktime_get_ns() / 1000000000 + 60;
	if (key->protocol == TCP)
		return ct4.update(key, &entry);
	return ct_any4.update(key, &entry);
}

/* Where the packet is to go: 0 with the target, -1 where it is to no Service, or the reason why it is dropped. */
static __always_inline int balance(struct flow *flow, struct target *to, u8 only)
{
	struct ct4_key ct = {flow->saddr, flow->daddr, flow->dport, flow->sport, flow->protocol, CT_SERVICE};
	struct lb4_key key = {.address = flow->daddr, .port = flow->dport};
	struct lb4_backend *backend = 0;
	struct lb_service *service;
	struct ct_entry *entry;
	u32 count, differ, id;

	KPT_CONSTANT(differ, HOLE_PROTOCOL_IN_KEYS);
	key.protocol = differ ? flow->protocol : 0;
	service = services4.lookup(&key);
	if (!service || (only && !(service->flags & only)))
		return -1;
	count = service->count;
	to->rev_nat_index = service->rev_nat_index;
	if (!count)
		return DROP_NO_SERVICE;
	entry = connection(&ct);
	if (entry) {
		id = entry->backend_id;
		backend = backends4.lookup(&id);
		__sync_fetch_and_add(&entry->packets, 1);
	}
	if (!backend) {
		/* A new connection, or one whose back end is gone. */
		key.slot = hash(flow) % count + 1;
		service = services4.lookup(&key);
		if (!service)
			return DROP_NO_SERVICE;
		id = service->backend_id;
		backend = backends4.lookup(&id);
		if (!backend)
			return DROP_NO_SERVICE;
		if (connect_to(&ct, id, to->rev_nat_index))
			return DROP_CT_FULL;
		ct.saddr = backend->address;
		ct.dport = backend->port;
		ct.flags = 0;
		if (connect_to(&ct, 0, to->rev_nat_index))
			return DROP_CT_FULL;
	}
	to->address = backend->address;
	to->port = backend->port;
	return 0;
}

/* The whole work for a packet from a container; it runs by a tail call, as Cilium's does. */
int tail_handle_ipv4(struct __sk_buff *skb)
{
	struct flow flow = {};
	struct target to = {};
	int answer = read_flow(skb, &flow) ? -1 : balance(&flow, &to, 0);

	if (!answer && rewrite(skb, &flow, &to, IP_DADDR_AT, flow.daddr, DPORT_AT, flow.dport))
		answer = DROP_WRITE_ERROR;
	if (answer > 0) {
		account(answer, EGRESS, FILE_LXC, __LINE__, skb->len);
		return TC_SHOT;
	}
	account(REASON_FORWARDED, EGRESS, FILE_LXC, __LINE__, skb->len);
	return TC_OK;
}

int cil_from_container(struct __sk_buff *skb)
{
	calls.call(skb, TAIL_FROM_CONTAINER);
	account(DROP_MISSED_TAIL_CALL, EGRESS, FILE_LXC, __LINE__, skb->len);
	return TC_SHOT;
}

/* The whole work for a packet to a container. */
int tail_ipv4_to_endpoint(struct __sk_buff *skb)
{
	struct ct4_key key = {};
	struct ct_entry *entry;
	struct reverse4 *service;
	struct flow flow = {};
	struct target from = {};
	u16 index;

	if (!read_flow(skb, &flow)) {
		key.daddr = flow.daddr;
		key.saddr = flow.saddr;
		key.dport = flow.sport;
		key.sport = flow.dport;
		key.protocol = flow.protocol;
		entry = connection(&key);
		index = entry ? entry->rev_nat_index : 0;
		service = index ? reverse_nat4.lookup(&index) : 0;
		if (service) {
			from.address = service->address;
			from.port = service->port;
			if (rewrite(skb, &flow, &from, IP_SADDR_AT, flow.saddr, SPORT_AT, flow.sport)) {
				account(DROP_WRITE_ERROR, INGRESS, FILE_LXC, __LINE__, skb->len);
				return TC_SHOT;
			}
		}
	}
	account(REASON_FORWARDED, INGRESS, FILE_LXC, __LINE__, skb->len);
	return TC_OK;
}

int cil_to_container(struct __sk_buff *skb)
{
	calls.call(skb, TAIL_TO_CONTAINER);
	account(DROP_MISSED_TAIL_CALL, INGRESS, FILE_LXC, __LINE__, skb->len);
	return TC_SHOT;
}

/* Packets from the node's network: nothing of theirs is translated here, they are counted. */
int cil_from_netdev(struct __sk_buff *skb)
{
	account(REASON_FORWARDED, INGRESS, FILE_HOST, __LINE__, skb->len);
	return TC_OK;
}

/* Services that are reached from outside, as Cilium's acceleration: cluster IPs are left to tc. */
int cil_xdp_entry(struct xdp_md *ctx)
{
	u8 *data = (u8 *)(long)ctx->data, *end = (u8 *)(long)ctx->data_end;
	struct flow flow = {};
	struct target to = {};
	u16 *check;
	int answer;

	if (data + UDP_CHECK_AT + 2 > end || *(u16 *)(data + 12) != ETHERTYPE_IP || data[ETH_BYTES] != PLAIN_IP ||
	    *(u16 *)(data + ETH_BYTES + 6) & FRAGMENT)
		return XDP_CODE_PASS;
	flow.protocol = data[IP_PROTOCOL_AT];
	check = (u16 *)(data + (flow.protocol == TCP ? TCP_CHECK_AT : UDP_CHECK_AT));
	if ((flow.protocol != TCP && flow.protocol != UDP) || (u8 *)(check + 1) > end)
		return XDP_CODE_PASS;
	flow.saddr = *(u32 *)(data + IP_SADDR_AT);
	flow.daddr = *(u32 *)(data + IP_DADDR_AT);
	flow.sport = *(u16 *)(data + SPORT_AT);
	flow.dport = *(u16 *)(data + DPORT_AT);
	answer = balance(&flow, &to, EXTERNAL);
	if (answer < 0)
		return XDP_CODE_PASS;
	if (answer) {
		account(answer, INGRESS, FILE_XDP, __LINE__, end - data);
		return XDP_CODE_DROP;
	}
	if (flow.protocol == TCP || *check)
		*check = adjusted(*check, flow.daddr, to.address, flow.dport, to.port);
	check = (u16 *)(data + IP_CHECK_AT);
	*check = adjusted(*check, flow.daddr, to.address, 0, 0);
	*(u32 *)(data + IP_DADDR_AT) = to.address;
	*(u16 *)(data + DPORT_AT) = to.port;
	account(REASON_FORWARDED, SERVICE, FILE_XDP, __LINE__, end - data);
	return XDP_CODE_PASS;
}
