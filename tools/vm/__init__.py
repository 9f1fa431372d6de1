# SPDX-License-Identifier: Apache-2.0
"""Virtual machines with Debian's kernels and the shipped image's root, for tests/vm and for experiments.

Standard library only. `matrix` says which kernels; `mirror` and `kernels` bring them; `disk` makes the root from the
image; `boot` runs one machine; `suite` runs the tests in it; `cli` is the command (tools/vm/run.py).
"""
