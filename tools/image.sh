#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the container image `kptrace` from the Dockerfile with buildah, without a container engine, and says how large
# it is and how fast it starts. Where the Dockerfile's base cannot be pulled, a base is made from the mirror that this
# machine's own apt uses, and kept in ${XDG_CACHE_HOME:-~/.cache}/kptrace.
# Usage: tools/image.sh [arguments for buildah bud, such as --build-arg BASE=debian:trixie-slim]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly cache=${XDG_CACHE_HOME:-$HOME/.cache}/kptrace
readonly own_base=localhost/kptrace-base
readonly pull_seconds=120

scratch=$(mktemp -d)
container=
clean_up() {
    [ -z "$container" ] || buildah rm "$container" >/dev/null
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

fail() {
    echo "image: $1" >&2
    exit 1
}

# Runs a command and shows its output only if it fails.
quietly() {
    local output
    if ! output=$("$@" </dev/null 2>&1); then
        printf '%s\n' "$output" >&2
        fail "failed: $*"
    fi
}

# need COMMAND PACKAGE...: installs the Debian packages unless the command is there.
need() {
    local command=$1
    shift
    ! command -v "$command" >/dev/null || return 0
    command -v apt-get >/dev/null || fail "$command is missing, and this is no Debian: install it by hand"
    echo "image: installing $*"
    export DEBIAN_FRONTEND=noninteractive
    quietly apt-get --option Acquire::Retries=3 update
    quietly apt-get --option Acquire::Retries=3 --option DPkg::Lock::Timeout=300 \
        install --yes --no-install-recommends "$@"
}

# The mirror of the Debian archive in this machine's own apt sources.
mirror() {
    # shellcheck disable=SC2016  # apt fills these in, not the shell
    local format='$(ORIGIN)|$(LABEL)|$(REPO_URI)' found
    found=$(apt-get indextargets --format "$format" 'Created-By: Packages' | sed -n 's/^Debian|Debian|//p' | head -n 1)
    if [ -z "$found" ]; then # never updated, so apt does not know yet whose archives they are
        quietly apt-get --option Acquire::Retries=3 update
        found=$(apt-get indextargets --format "$format" 'Created-By: Packages' | sed -n 's/^Debian|Debian|//p' | head -n 1)
    fi
    [ -n "$found" ] || fail "this machine's apt sources name no mirror of Debian"
    printf '%s\n' "$found"
}

# What apt needs here to reach its mirror (proxies, clocks that are off), as arguments for mmdebstrap.
apt_options() {
    apt-config dump Acquire | sed -n -E 's/^(Acquire::(http|https|Check-Date|Check-Valid-Until|Retries)(::[^ ]+)? ".+";)$/--aptopt=\1/p'
}

# Prints the name of the base to build on; the one argument is what the Dockerfile names.
base() {
    local wanted=$1 suite image tar options
    suite=${wanted##*:}
    suite=${suite%-slim}
    for image in "$wanted" "$own_base:$suite"; do
        if buildah inspect --type image "$image" >/dev/null 2>&1; then
            printf '%s\n' "$image"
            return
        fi
    done
    if timeout "$pull_seconds" buildah pull --quiet "$wanted" >/dev/null 2>"$scratch/pull"; then
        printf '%s\n' "$wanted"
        return
    fi
    tar=$cache/base-$suite.tar
    if [ ! -e "$tar" ]; then
        echo "image: $wanted cannot be pulled; making a base of Debian $suite from this machine's own mirror" >&2
        need mmdebstrap mmdebstrap >&2
        mkdir -p "$cache"
        mapfile -t options < <(apt_options)
        quietly mmdebstrap --quiet --variant=minbase --format=tar "${options[@]}" "$suite" "$scratch/base.tar" "$(mirror)"
        mv "$scratch/base.tar" "$tar"
    fi
    image=$(buildah from scratch)
    quietly buildah add "$image" "$tar" /
    quietly buildah commit --rm "$image" "$own_base:$suite"
    printf '%s\n' "$own_base:$suite"
}

# This machine's own pip configuration for the build stage, which forgets it: arguments for buildah bud.
pip_secrets() {
    local python settings certificate
    for python in .venv/bin/python python3; do
        settings=$("$python" -m pip config list 2>/dev/null) && break
    done
    # The environment comes first in pip's list, and wins.
    settings=$(sed -n -E "s/^(:env:|global|install)\.(index-url|extra-index-url|trusted-host|proxy|timeout|cert)='(.*)'$/\2 = \3/p" \
        <<<"${settings:-}" | awk '!seen[$1]++')
    [ -n "$settings" ] || return 0
    certificate=$(sed -n 's/^cert = //p' <<<"$settings")
    {
        echo "[global]"
        grep -v '^cert = ' <<<"$settings" || true
        [ -z "$certificate" ] || echo "cert = /run/pip-ca.crt"
    } >"$scratch/pip.conf"
    printf '%s\n' --secret "id=pip_conf,src=$scratch/pip.conf"
    [ -z "$certificate" ] || printf '%s\n' --secret "id=pip_ca,src=$certificate"
}

# What the image must not have: something that compiles but BCC, kernel headers, pip.
check_contents() {
    local root=$1 found
    found=$(cd "$root" && find . -xdev \( -path './usr/src/linux-headers*' -o -path './usr/lib/modules/*' \
        -o -path './usr/bin/*' \( -name 'gcc*' -o -name 'cc' -o -name 'clang*' -o -name 'nft' -o -name 'pip*' \) \
        -o -path './opt/kptrace/bin/pip*' -o -path './usr/sbin/nft' -o -path './usr/sbin/iptables*' \) -print)
    [ -z "$found" ] || fail "the image has what it should not have: ${found//$'\n'/ }"
}

# Starts `kptrace version` five times in the image's root folder; prints the median in milliseconds.
startup_ms() {
    local begin end
    for _ in 1 2 3 4 5; do
        begin=${EPOCHREALTIME/[.,]/}
        chroot "$1" /opt/kptrace/bin/kptrace version >/dev/null
        end=${EPOCHREALTIME/[.,]/}
        echo $(((end - begin) / 1000))
    done | sort -n | sed -n 3p
}

# build_stage NAME [arguments]: builds NAME:latest, and removes what had that name before.
build_stage() {
    local name=$1 before after
    shift
    before=$(buildah images --quiet --no-trunc "localhost/$name:latest" 2>/dev/null || true)
    quietly "${build[@]}" --tag "$name:latest" "$@" .
    after=$(buildah images --quiet --no-trunc "localhost/$name:latest")
    # An image that something else was built on cannot be removed, and goes with that one.
    [ -z "$before" ] || [ "$before" = "$after" ] || buildah rmi "$before" >/dev/null 2>&1 || true
}

main() {
    local version revision base_image secrets root
    local -a build
    [ "$(id -u)" -eq 0 ] || fail "must be root to build: run it as root, or build the Dockerfile with any other builder"
    need buildah buildah
    # Two builds at a time would take each other's images away.
    mkdir -p "$cache"
    exec 9>"$cache/image.lock"
    flock 9
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' kptrace/__init__.py)
    revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
    case " $* " in
        *" BASE="*) base_image="its own base" ;; # the caller's argument comes last, and wins
        *) base_image=$(base "$(sed -n 's/^ARG BASE=//p' Dockerfile)") ;;
    esac
    mapfile -t secrets < <(pip_secrets)
    build=(buildah bud --quiet --isolation chroot --layers --pull-never --build-arg "BASE=$base_image"
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision" "${secrets[@]}" "$@")
    # The stages get names too: their layers stay for the next build, and tools/vm/Dockerfile builds on them.
    build_stage kptrace-build --target build
    build_stage kptrace-runtime --target runtime
    build_stage kptrace --tag "kptrace:$version"

    container=$(buildah from --pull-never localhost/kptrace:latest)
    root=$(buildah mount "$container")
    check_contents "$root"
    printf 'kptrace:%s on %s: %s MB unpacked, %s MB of it kptrace and what pip brought; starts in %s ms\n' \
        "$version" "$base_image" "$(du -sxm "$root" | cut -f 1)" "$(du -sxm "$root/opt/kptrace" | cut -f 1)" \
        "$(startup_ms "$root")"
}

main "$@"
