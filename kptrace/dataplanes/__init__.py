# SPDX-License-Identifier: Apache-2.0
"""What is installed in the kernel, read without an external binary: one folder a data plane; they are independent."""
