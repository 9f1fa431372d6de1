# SPDX-License-Identifier: Apache-2.0
"""What the running kernel can do, its BTF, and compiling, loading and attaching BPF programs."""
