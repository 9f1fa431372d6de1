# SPDX-License-Identifier: Apache-2.0
"""The programs that run in the kernel, as package data of `kptrace.bpf`. Each .bpf.c file is one signal's."""
