// SPDX-License-Identifier: GPL-2.0-only
/* One transaction again and again, each timed by itself: ns of the least on standard output.
 *
 * commit nft RULES ROUNDS      empties chain `c` of table `ip big` and fills it, by one nfnetlink batch
 * commit legacy ROUNDS         replaces the legacy filter table by itself
 *
 * A writer of our own, because strace's figure holds the time until strace itself runs again.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter_ipv4/ip_tables.h>
#include <linux/netlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH_BYTES (8 << 20)
#define PAUSE_NS 300000000

static char *out;

static void *put(const void *data, size_t size)
{
	void *at = memcpy(out, data, size);

	out += (size + 3) & ~3ul;
	return at;
}

static struct nlmsghdr *begin(int type, int flags, int resource)
{
	struct nlmsghdr header = {.nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags};
	struct nfgenmsg family = {.nfgen_family = resource ? AF_UNSPEC : AF_INET, .res_id = htons(resource)};
	struct nlmsghdr *message = put(&header, sizeof(header));

	put(&family, sizeof(family));
	return message;
}

static void end(struct nlmsghdr *message)
{
	message->nlmsg_len = out - (char *)message;
}

static struct nlattr *nest(int type)
{
	struct nlattr header = {.nla_type = type | NLA_F_NESTED};

	return put(&header, sizeof(header));
}

static void close_nest(struct nlattr *attribute)
{
	attribute->nla_len = out - (char *)attribute;
}

static void attribute(int type, const void *data, size_t size)
{
	struct nlattr header = {.nla_type = type, .nla_len = sizeof(header) + size};

	memset(out, 0, sizeof(header) + size + 4);
	put(&header, sizeof(header));
	put(data, size);
}

static void text(int type, const char *value)
{
	attribute(type, value, strlen(value) + 1);
}

static void number(int type, unsigned int value)
{
	value = htonl(value);
	attribute(type, &value, sizeof(value));
}

/* ip daddr ADDRESS counter */
static void rule(unsigned int address)
{
	struct nlmsghdr *message = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, 0);
	struct nlattr *list, *element, *data, *value;

	text(NFTA_RULE_TABLE, "big");
	text(NFTA_RULE_CHAIN, "c");
	list = nest(NFTA_RULE_EXPRESSIONS);
	element = nest(NFTA_LIST_ELEM);
	text(NFTA_EXPR_NAME, "payload");
	data = nest(NFTA_EXPR_DATA);
	number(NFTA_PAYLOAD_DREG, NFT_REG_1);
	number(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
	number(NFTA_PAYLOAD_OFFSET, 16);
	number(NFTA_PAYLOAD_LEN, 4);
	close_nest(data);
	close_nest(element);
	element = nest(NFTA_LIST_ELEM);
	text(NFTA_EXPR_NAME, "cmp");
	data = nest(NFTA_EXPR_DATA);
	number(NFTA_CMP_SREG, NFT_REG_1);
	number(NFTA_CMP_OP, NFT_CMP_EQ);
	value = nest(NFTA_CMP_DATA);
	number(NFTA_DATA_VALUE, address);
	close_nest(value);
	close_nest(data);
	close_nest(element);
	element = nest(NFTA_LIST_ELEM);
	text(NFTA_EXPR_NAME, "counter");
	close_nest(nest(NFTA_EXPR_DATA));
	close_nest(element);
	close_nest(list);
	end(message);
}

static size_t batch(char *buffer, unsigned int rules)
{
	struct nlmsghdr *message;

	out = buffer;
	end(begin(NFNL_MSG_BATCH_BEGIN, 0, NFNL_SUBSYS_NFTABLES));
	message = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE, NLM_F_CREATE, 0);
	text(NFTA_TABLE_NAME, "big");
	end(message);
	message = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN, NLM_F_CREATE, 0);
	text(NFTA_CHAIN_TABLE, "big");
	text(NFTA_CHAIN_NAME, "c");
	end(message);
	message = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELRULE, 0, 0);
	text(NFTA_RULE_TABLE, "big");
	text(NFTA_RULE_CHAIN, "c");
	end(message);
	for (unsigned int i = 0; i < rules; i++)
		rule(0x0a000001 + (i << 8));
	end(begin(NFNL_MSG_BATCH_END, 0, NFNL_SUBSYS_NFTABLES));
	return out - buffer;
}

static double now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static double commit_nft(unsigned int rules)
{
	static char buffer[BATCH_BYTES];
	int channel = socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER), size = BATCH_BYTES;
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	struct iovec vector = {.iov_base = buffer, .iov_len = batch(buffer, rules)};
	struct msghdr message = {
		.msg_name = &kernel, .msg_namelen = sizeof(kernel), .msg_iov = &vector, .msg_iovlen = 1};
	char answer[4096];
	double before, took;

	setsockopt(channel, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size));
	before = now_ns();
	if (sendmsg(channel, &message, 0) < 0) {
		perror("commit: sendmsg");
		exit(1);
	}
	took = now_ns() - before;
	/* No message asks for an answer: what comes is an error. */
	if (recv(channel, answer, sizeof(answer), MSG_DONTWAIT) > 0) {
		fprintf(stderr, "commit: %s\n", strerror(-((struct nlmsgerr *)(answer + NLMSG_HDRLEN))->error));
		exit(1);
	}
	close(channel);
	return took;
}

static double commit_legacy(void)
{
	int channel = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);
	struct ipt_getinfo info = {.name = "filter"};
	socklen_t length = sizeof(info);
	struct ipt_get_entries *entries;
	struct ipt_replace *replace;
	double before, took;

	if (getsockopt(channel, SOL_IP, IPT_SO_GET_INFO, &info, &length)) {
		perror("commit: IPT_SO_GET_INFO");
		exit(1);
	}
	length = sizeof(*entries) + info.size;
	entries = calloc(1, length);
	replace = calloc(1, sizeof(*replace) + info.size);
	strcpy(entries->name, "filter");
	entries->size = info.size;
	if (getsockopt(channel, SOL_IP, IPT_SO_GET_ENTRIES, entries, &length)) {
		perror("commit: IPT_SO_GET_ENTRIES");
		exit(1);
	}
	strcpy(replace->name, "filter");
	replace->valid_hooks = info.valid_hooks;
	replace->num_entries = info.num_entries;
	replace->size = info.size;
	memcpy(replace->hook_entry, info.hook_entry, sizeof(info.hook_entry));
	memcpy(replace->underflow, info.underflow, sizeof(info.underflow));
	replace->num_counters = info.num_entries;
	replace->counters = calloc(info.num_entries, sizeof(struct xt_counters));
	memcpy(replace->entries, entries->entrytable, info.size);
	before = now_ns();
	if (setsockopt(channel, SOL_IP, IPT_SO_SET_REPLACE, replace, sizeof(*replace) + info.size)) {
		perror("commit: IPT_SO_SET_REPLACE");
		exit(1);
	}
	took = now_ns() - before;
	free(replace->counters);
	free(replace);
	free(entries);
	close(channel);
	return took;
}

int main(int argc, char **argv)
{
	int nft = argc == 4 && !strcmp(argv[1], "nft"), rounds = argc > 2 ? atoi(argv[argc - 1]) : 0;
	double least = 0;

	if ((!nft && (argc != 3 || strcmp(argv[1], "legacy"))) || rounds < 1) {
		fprintf(stderr, "usage: commit nft RULES ROUNDS | legacy ROUNDS\n");
		return 2;
	}
	for (int i = 0; i < rounds; i++) {
		/* As writers do: whoever looks at the rules after a commit is done with it before the next. */
		struct timespec pause = {.tv_nsec = PAUSE_NS};
		double took;

		nanosleep(&pause, NULL);
		took = nft ? commit_nft(atoi(argv[2])) : commit_legacy();

		if (!i || took < least)
			least = took;
	}
	printf("%.0f\n", least);
	return 0;
}
