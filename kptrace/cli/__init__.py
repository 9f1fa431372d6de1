# SPDX-License-Identifier: Apache-2.0
"""One file a command. Only here: printing, exit codes, and the configuration of logging."""
