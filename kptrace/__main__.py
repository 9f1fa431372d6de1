# SPDX-License-Identifier: Apache-2.0
"""`python -m kptrace`."""

from kptrace.cli.main import main

main()
