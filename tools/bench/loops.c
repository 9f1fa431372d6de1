// SPDX-License-Identifier: GPL-2.0-only
/* The loops that `make bench` times: ns per iteration on standard output. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define PORT 5353

/* Receives what was sent, so that there is one packet a send: a closed port would answer each by another one. */
static void drain(int sink)
{
	static char bytes[BATCH];
	struct iovec vectors[BATCH];
	struct mmsghdr messages[BATCH] = {0};

	for (int i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){.iov_base = &bytes[i], .iov_len = 1};
		messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
	}
	while (recvmmsg(sink, messages, BATCH, MSG_DONTWAIT, NULL) == BATCH)
		;
}

static double elapsed_ns(const struct timespec *from)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (now.tv_sec - from->tv_sec) * 1e9 + (now.tv_nsec - from->tv_nsec);
}

int main(int argc, char **argv)
{
	long count = argc > 2 ? atol(argv[2]) : 0;
	struct timespec begin;
	int udp = socket(AF_INET, SOCK_DGRAM, 0), sink = socket(AF_INET, SOCK_DGRAM, 0);
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	struct iovec byte = {.iov_base = "k", .iov_len = 1};
	struct msghdr message = {.msg_name = &to, .msg_namelen = sizeof(to), .msg_iov = &byte, .msg_iovlen = 1};
	long failed = 0;

	if (count <= 0 || udp < 0) {
		fprintf(stderr, "usage: loops sendto|sendmsg|recvfrom|getppid COUNT\n");
		return 2;
	}
	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 4);
	if (bind(sink, (struct sockaddr *)&to, sizeof(to))) {
		perror("loops: bind");
		return 1;
	}
	clock_gettime(CLOCK_MONOTONIC, &begin);
	if (!strcmp(argv[1], "sendto"))
		for (long i = 0; i < count; i++) {
			failed += sendto(udp, "k", 1, 0, (struct sockaddr *)&to, sizeof(to)) != 1;
			if (i % BATCH == BATCH - 1)
				drain(sink);
		}
	else if (!strcmp(argv[1], "sendmsg")) {
		message.msg_name = NULL; /* to nowhere: a packet takes ten times what is looked for here */
		for (long i = 0; i < count; i++)
			failed += sendmsg(udp, &message, 0) != 1;
	} else if (!strcmp(argv[1], "recvfrom")) {
		for (long i = 0; i < count; i++) /* of nothing */
			failed += recvfrom(sink, &byte, sizeof(byte), MSG_DONTWAIT, NULL, NULL) != -1;
	} else
		for (long i = 0; i < count; i++)
			syscall(SYS_getppid);
	printf("%.1f %ld\n", elapsed_ns(&begin) / count, failed);
	return 0;
}
