// SPDX-License-Identifier: GPL-2.0-only
/* The experiments' socket load balancer with Cilium's names: a connect() or a datagram to a Service goes to a back end,
 * and what the socket hears of that is said to come from the Service.
 *
 * The maps here only stand for those that the experiment makes: experiments/cilium_layouts.py, MapName.
 */
#include <linux/types.h>
#include <kptrace/types.h>
#include <kptrace/datapath_fixture.h>

BPF_TABLE("hash", struct lb4_key, struct lb_service, services4, 1);
BPF_TABLE("hash", struct lb6_key, struct lb_service, services6, 1);
BPF_TABLE("hash", u32, struct lb4_backend, backends4, 1);
BPF_TABLE("hash", u32, struct lb6_backend, backends6, 1);
BPF_TABLE("lru_hash", struct socket4_key, struct socket4_value, sockets4, 1);
BPF_TABLE("lru_hash", struct socket6_key, struct socket6_value, sockets6, 1);
BPF_TABLE("percpu_hash", struct metric_key, struct metric, metrics, 1);

enum { REJECT, PROCEED };

static __always_inline int refuse(u8 reason, u16 line)
{
	struct metric_key key = {.reason = reason, .direction = EGRESS, .line = line, .file = FILE_SOCK};
	struct metric first = {1, 0}, *metric = metrics.lookup(&key);

	if (metric)
		metric->count++;
	else
		metrics.update(&key, &first);
	return REJECT;
}

static __always_inline int translate4(struct bpf_sock_addr *ctx)
{
	struct lb4_key key = {.address = ctx->user_ip4, .port = ctx->user_port};
	struct socket4_key socket = {};
	struct socket4_value original = {};
	struct lb4_backend *backend;
	struct lb_service *service;
	u32 differ, id, count;

	KPT_CONSTANT(differ, HOLE_PROTOCOL_IN_KEYS);
	key.protocol = differ ? ctx->protocol : 0;
	service = services4.lookup(&key);
	if (!service)
		return PROCEED;
	count = service->count;
	if (!count)
		return refuse(REASON_NO_SLOT, __LINE__);
	original.address = key.address;
	original.port = key.port;
	original.rev_nat_index = service->rev_nat_index;
	key.slot = bpf_get_prandom_u32() % count + 1;
	service = services4.lookup(&key);
	if (!service)
		return refuse(REASON_NO_SLOT, __LINE__);
	id = service->backend_id;
	backend = backends4.lookup(&id);
	if (!backend)
		return refuse(REASON_NO_BACKEND, __LINE__);
	socket.cookie = bpf_get_socket_cookie(ctx);
	socket.address = backend->address;
	socket.port = backend->port;
	sockets4.update(&socket, &original);
	ctx->user_ip4 = socket.address;
	ctx->user_port = socket.port;
	return PROCEED;
}

/* Never refused: the kernel accepts no other answer here. */
static __always_inline int restore4(struct bpf_sock_addr *ctx)
{
	struct socket4_key socket = {.address = ctx->user_ip4, .port = ctx->user_port};
	struct socket4_value *original;

	socket.cookie = bpf_get_socket_cookie(ctx);
	original = sockets4.lookup(&socket);
	if (original) {
		ctx->user_ip4 = original->address;
		ctx->user_port = original->port;
	}
	return PROCEED;
}

static __always_inline int translate6(struct bpf_sock_addr *ctx)
{
	struct lb6_key key = {.port = ctx->user_port};
	struct socket6_key socket = {};
	struct socket6_value original = {};
	struct lb6_backend *backend;
	struct lb_service *service;
	u32 differ, id, count;

	key.address[0] = original.address[0] = ctx->user_ip6[0];
	key.address[1] = original.address[1] = ctx->user_ip6[1];
	key.address[2] = original.address[2] = ctx->user_ip6[2];
	key.address[3] = original.address[3] = ctx->user_ip6[3];
	KPT_CONSTANT(differ, HOLE_PROTOCOL_IN_KEYS);
	key.protocol = differ ? ctx->protocol : 0;
	service = services6.lookup(&key);
	if (!service)
		return PROCEED;
	count = service->count;
	if (!count)
		return refuse(REASON_NO_SLOT, __LINE__);
	original.port = key.port;
	original.rev_nat_index = service->rev_nat_index;
	key.slot = bpf_get_prandom_u32() % count + 1;
	service = services6.lookup(&key);
	if (!service)
		return refuse(REASON_NO_SLOT, __LINE__);
	id = service->backend_id;
	backend = backends6.lookup(&id);
	if (!backend)
		return refuse(REASON_NO_BACKEND, __LINE__);
	socket.cookie = bpf_get_socket_cookie(ctx);
	__builtin_memcpy(socket.address, backend->address, 16);
	socket.port = backend->port;
	sockets6.update(&socket, &original);
	ctx->user_ip6[0] = socket.address[0];
	ctx->user_ip6[1] = socket.address[1];
	ctx->user_ip6[2] = socket.address[2];
	ctx->user_ip6[3] = socket.address[3];
	ctx->user_port = socket.port;
	return PROCEED;
}

static __always_inline int restore6(struct bpf_sock_addr *ctx)
{
	struct socket6_key socket = {.port = ctx->user_port};
	struct socket6_value *original;

	socket.cookie = bpf_get_socket_cookie(ctx);
	socket.address[0] = ctx->user_ip6[0];
	socket.address[1] = ctx->user_ip6[1];
	socket.address[2] = ctx->user_ip6[2];
	socket.address[3] = ctx->user_ip6[3];
	original = sockets6.lookup(&socket);
	if (original) {
		ctx->user_ip6[0] = original->address[0];
		ctx->user_ip6[1] = original->address[1];
		ctx->user_ip6[2] = original->address[2];
		ctx->user_ip6[3] = original->address[3];
		ctx->user_port = original->port;
	}
	return PROCEED;
}

int cil_sock4_connect(struct bpf_sock_addr *ctx)
{
	return translate4(ctx);
}

int cil_sock4_sendmsg(struct bpf_sock_addr *ctx)
{
	return translate4(ctx);
}

int cil_sock4_recvmsg(struct bpf_sock_addr *ctx)
{
	return restore4(ctx);
}

int cil_sock4_getpeername(struct bpf_sock_addr *ctx)
{
	return restore4(ctx);
}

int cil_sock6_connect(struct bpf_sock_addr *ctx)
{
	return translate6(ctx);
}

int cil_sock6_sendmsg(struct bpf_sock_addr *ctx)
{
	return translate6(ctx);
}

int cil_sock6_recvmsg(struct bpf_sock_addr *ctx)
{
	return restore6(ctx);
}

int cil_sock6_getpeername(struct bpf_sock_addr *ctx)
{
	return restore6(ctx);
}
