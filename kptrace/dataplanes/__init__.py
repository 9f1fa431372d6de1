# SPDX-License-Identifier: Apache-2.0
"""What is installed in the kernel, read without any external binary: one folder a data plane, independent of each other."""
