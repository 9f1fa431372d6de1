#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes everything that the other make targets need: Debian packages (as root) and .venv with kptrace installed in it.
# A second run finds everything in place and ends at once. apt and pip keep their caches where they always do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv
readonly stamp=$venv/.setup-stamp

# What each is for: BCC compiles the BPF programs; gcc and libc6-dev let the unit tests compare layouts with offsetof;
# nftables, iptables, iproute2, conntrack, ethtool and kmod build embedded nodes; bpftool, strace, bpftrace and
# prometheus (with promtool) are the oracles of the native tests; clang-format and shellcheck are for make check.
readonly packages=(
    python3-bpfcc python3-venv
    gcc libc6-dev
    nftables iptables iproute2 conntrack ethtool kmod procps curl
    bpftool strace bpftrace prometheus
    clang-format shellcheck
)

missing_packages() {
    local installed package
    installed=$(dpkg-query --show --showformat='${binary:Package} ${db:Status-Status}\n' 2>/dev/null |
        awk '$2 == "installed" { sub(/:.*/, "", $1); print $1 }')
    for package in "${packages[@]}"; do
        grep --quiet --line-regexp --fixed-strings "$package" <<<"$installed" || printf '%s\n' "$package"
    done
}

# Runs a command and shows its output only if it fails.
quietly() {
    local output
    if ! output=$("$@" </dev/null 2>&1); then
        printf '%s\n' "$output" >&2
        echo "setup: failed: $*" >&2
        return 1
    fi
}

# Installs packages without starting their services: prometheus is wanted for promtool and for tests that start it
# themselves. Debian asks /usr/sbin/policy-rc.d before it starts anything; one that is there already is left alone.
install_packages() {
    local policy=/usr/sbin/policy-rc.d made_policy=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        made_policy=$policy
    fi
    # shellcheck disable=SC2064  # the path as it is now
    trap "[ -z '$made_policy' ] || rm -f '$made_policy'" EXIT
    export DEBIAN_FRONTEND=noninteractive
    quietly apt-get --option Acquire::Retries=3 update
    quietly apt-get --option Acquire::Retries=3 --option DPkg::Lock::Timeout=300 \
        install --yes --no-install-recommends "$@"
    if [ -d /run/systemd/system ] && [[ " $* " == *" prometheus "* ]]; then
        systemctl disable --quiet prometheus.service || true # nor at the next boot
    fi
}

checksum() {
    {
        cat setup.cfg setup.py pyproject.toml
        pwd
        /usr/bin/python3 --version
    } | sha256sum | cut -d ' ' -f 1
}

main() {
    local missing wanted
    if ! command -v dpkg-query >/dev/null; then
        echo "setup: this is no Debian; install the equivalents of: ${packages[*]}" >&2
        exit 1
    fi
    missing=$(missing_packages)
    if [ -n "$missing" ]; then
        if [ "$(id -u)" -ne 0 ]; then
            echo "setup: missing packages: ${missing//$'\n'/ }" >&2
            echo "setup: run 'make setup' once as root, or: sudo apt-get install ${missing//$'\n'/ }" >&2
            exit 1
        fi
        echo "setup: installing ${missing//$'\n'/ }"
        # shellcheck disable=SC2086  # one word a package
        install_packages $missing
    fi

    wanted=$(checksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -x "$venv/bin/kptrace" ]; then
        return
    fi
    # A .venv of another interpreter, or one that was moved, is made anew.
    if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null ||
        ! grep --quiet '^include-system-site-packages = true' "$venv/pyvenv.cfg"; then
        echo "setup: making $venv from /usr/bin/python3"
        rm -rf "$venv"
        /usr/bin/python3 -m venv --system-site-packages "$venv"
    fi
    echo "setup: installing kptrace and its development tools in $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --editable '.[dev]'
    printf '%s\n' "$wanted" >"$stamp"
}

main
