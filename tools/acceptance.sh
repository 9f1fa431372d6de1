#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The long demonstrations, kept runnable: each is an executable tests/acceptance/NAME.
# Usage: tools/acceptance.sh [NAME]; without a name all of them, one after the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -gt 0 ]; then
    parts=("tests/acceptance/$1")
    if [ ! -x "${parts[0]}" ]; then
        echo "acceptance: no executable ${parts[0]}" >&2
        exit 2
    fi
else
    mapfile -t parts < <(find tests/acceptance -maxdepth 1 -type f -executable 2>/dev/null | sort)
    [ "${#parts[@]}" -gt 0 ] || echo "There are no acceptance demonstrations yet."
fi

failed=0
for part in "${parts[@]}"; do
    tools/step.sh "acceptance: ${part##*/}" "$part" || failed=1
done
exit "$failed"
