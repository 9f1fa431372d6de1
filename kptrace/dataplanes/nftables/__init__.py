# SPDX-License-Identifier: Apache-2.0
"""nf_tables: base chains by a raw netlink dump, and what a writer's batch changes, from its own bytes."""
