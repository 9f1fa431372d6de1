// SPDX-License-Identifier: GPL-2.0-only
/* Walks from the running task to its namespaces, parents and sockets.
 *
 * Every step casts first, so that it does not matter what the verifier knows of the pointer: an array of pointers or a
 * void * is a mere number to it. Where the kernel has no bpf_rdonly_cast() (before v6.2), bpf_probe_read_kernel() does the
 * same, which a confidential lockdown refuses. A pointer that is null or stale reads as 0 either way.
 */
#ifndef KPTRACE_TASK_H
#define KPTRACE_TASK_H

#include <kptrace/types.h>

#ifdef KPT_KFUNC_RDONLY_CAST
static void *(*rdonly_cast)(u64 pointer, u32 type) = (void *)0x7fff0001; /* kfunc 0 */

#define KPT_FOLLOW(width, to, from, type, offset)                                                   \
	do {                                                                                        \
		u64 cast_ = (u64)rdonly_cast((u64)(from), type);                                    \
		asm volatile("%0 = *(" #width " *)(%1 + %2)" : "=r"(to) : "r"(cast_), "i"(offset)); \
	} while (0)
#else
#define KPT_FOLLOW(width, to, from, type, offset)                                                 \
	do {                                                                                      \
		width value_ = 0;                                                                 \
		bpf_probe_read_kernel(&value_, sizeof(value_), (void *)((u64)(from) + (offset))); \
		(to) = value_;                                                                    \
	} while (0)
#endif

#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define KPT_PARENTS 4

/* struct pt_regs begins with 16 words on every machine: a view of any memory as words. */
#define KPT_WORD(to, from, index) KPT_FOLLOW(u64, to, from, KPT_PT_REGS, (index)*8)

static __always_inline u32 task_netns(u64 task)
{
	u64 proxy, net, inode;

	KPT_FOLLOW(u64, proxy, task, KPT_TASK, KPT_TASK_NSPROXY);
	KPT_FOLLOW(u64, net, proxy, KPT_NSPROXY, KPT_NSPROXY_NET);
	KPT_FOLLOW(u32, inode, net, KPT_NET, KPT_NET_INUM);
	return inode;
}

static __always_inline u32 task_mntns(u64 task)
{
	u64 proxy, mnt, inode;

	KPT_FOLLOW(u64, proxy, task, KPT_TASK, KPT_TASK_NSPROXY);
	KPT_FOLLOW(u64, mnt, proxy, KPT_NSPROXY, KPT_NSPROXY_MNT);
	KPT_FOLLOW(u32, inode, mnt, KPT_MNT, KPT_MNT_INUM);
	return inode;
}

/* Tgids of the parent, the grandparent and so on, as they are now. */
static __always_inline void task_parents(u64 task, u32 *parents)
{
	u64 tgid;

#pragma unroll
	for (int i = 0; i < KPT_PARENTS; i++) {
		KPT_FOLLOW(u64, task, task, KPT_TASK, KPT_TASK_PARENT);
		KPT_FOLLOW(u32, tgid, task, KPT_TASK, KPT_TASK_TGID);
		parents[i] = tgid;
	}
}

/* The struct file behind a descriptor of the running task, or 0. */
static __always_inline u64 task_file(u64 descriptor)
{
	u64 number = (u32)descriptor, files, table, most, array, file;

	KPT_FOLLOW(u64, files, bpf_get_current_task(), KPT_TASK, KPT_TASK_FILES);
	KPT_FOLLOW(u64, table, files, KPT_FILES, KPT_FILES_FDT);
	KPT_FOLLOW(u32, most, table, KPT_FDTABLE, KPT_FDTABLE_MAX);
	if (number >= most)
		return 0;
	KPT_FOLLOW(u64, array, table, KPT_FDTABLE, KPT_FDTABLE_FD);
	KPT_WORD(file, array + number * 8, 0);
	return file;
}

/* The struct sock behind a descriptor of the running task, or 0. */
static __always_inline u64 task_socket(u64 descriptor)
{
	u64 file = task_file(descriptor), inode, mode, sock, sk;

	KPT_FOLLOW(u64, inode, file, KPT_FILE, KPT_FILE_INODE);
	KPT_FOLLOW(u16, mode, inode, KPT_INODE, KPT_INODE_MODE);
	if ((mode & S_IFMT) != S_IFSOCK)
		return 0;
	KPT_FOLLOW(u64, sock, file, KPT_FILE, KPT_FILE_PRIVATE);
	KPT_FOLLOW(u64, sk, sock, KPT_SOCKET, KPT_SOCKET_SK);
	return sk;
}

#endif
