#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The command of tools.vm, from anywhere: tools/vm/run.py --help."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # The package is found beside this file, not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(importlib.import_module("tools.vm.cli").main())
