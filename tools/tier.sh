#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests of one tier that make test leaves out; a tier that has no tests yet says so and succeeds.
# Usage: tools/tier.sh TIER [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=$1
shift
if [ -z "$(find "tests/$tier" -name 'test_*.py' -print -quit 2>/dev/null)" ]; then
    echo "The $tier tier has no tests yet."
    exit 0
fi
exec .venv/bin/python -m pytest "tests/$tier" "$@"
