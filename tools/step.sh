#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs one command, says before what it is for and after how long it took. Usage: tools/step.sh "what it does" command...
set -uo pipefail

title=$1
shift
printf '==> %s\n' "$title"
started=$(date +%s%N)
"$@"
status=$?
elapsed=$((($(date +%s%N) - started) / 100000000))
verdict="done"
[ "$status" -eq 0 ] || verdict="FAILED (exit code $status)"
printf '<== %s: %s in %d.%d s\n' "$title" "$verdict" "$((elapsed / 10))" "$((elapsed % 10))"
exit "$status"
