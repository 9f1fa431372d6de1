#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds what the cluster tests run from the Go module beside this file: etcd, kube-apiserver and kube-proxy of one
# Kubernetes release, into ${XDG_CACHE_HOME:-~/.cache}/kptrace/kubernetes/<version>. A second run finds them and ends at
# once. A program that $KUBEBUILDER_ASSETS has is not built. Usage: build.sh
#
# etcd is not Debian's: bookworm's 3.4 lacks what a watch with initial events needs, and the API server then refuses it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly root=${XDG_CACHE_HOME:-$HOME/.cache}/kptrace/kubernetes
declare -rA programs=(
    [etcd]=go.etcd.io/etcd/server/v3
    [kube-apiserver]=k8s.io/kubernetes/cmd/kube-apiserver
    [kube-proxy]=k8s.io/kubernetes/cmd/kube-proxy
)

fail() {
    echo "cluster tools: $1" >&2
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

# need COMMAND PACKAGE: installs the Debian package unless the command is there.
need() {
    ! command -v "$1" >/dev/null || return 0
    command -v apt-get >/dev/null || fail "$1 is missing, and this is no Debian: install it by hand"
    [ "$(id -u)" -eq 0 ] || fail "$1 is missing: sudo apt-get install $2"
    echo "cluster tools: installing $2"
    export DEBIAN_FRONTEND=noninteractive
    quietly apt-get --option Acquire::Retries=3 update
    quietly apt-get --option Acquire::Retries=3 --option DPkg::Lock::Timeout=300 \
        install --yes --no-install-recommends "$2"
}

# at_least VERSION VERSION: whether the second is not older than the first.
at_least() {
    [ "$(printf '%s\n' "$1" "$2" | sort --version-sort | head -n 1)" = "$1" ]
}

# A Go that is older than go.mod asks for is enough to fetch one that is not: Go is a Go module too.
prepare_go() {
    local wanted have goroot source
    wanted=$(sed -n 's/^go //p' go.mod)
    need go golang-go
    have=$(GOTOOLCHAIN=local go version | sed -E 's/^go version go([0-9.]+).*/\1/')
    if at_least "$wanted" "$have"; then
        return
    fi
    echo "cluster tools: Go $have fetches Go $wanted, which Kubernetes needs"
    if at_least 1.21 "$have"; then
        export GOTOOLCHAIN=go$wanted
        return
    fi
    # Until 1.21 Go did not do by itself what follows. Not here: it would not understand this folder's go.mod.
    goroot=$root/go$wanted
    if [ ! -x "$goroot/bin/go" ]; then
        source=$(cd / && go mod download -json "golang.org/toolchain@v0.0.1-go$wanted.linux-$(go env GOARCH)" |
            sed -n 's/^\t"Dir": "\([^"]*\)".*/\1/p')
        rm -rf "$goroot.new"
        cp --recursive "$source" "$goroot.new"
        chmod --recursive u+w "$goroot.new"
        chmod +x "$goroot.new"/bin/* "$goroot.new"/pkg/tool/*/*
        mv "$goroot.new/src/_go.mod" "$goroot.new/src/go.mod"
        mv "$goroot.new/src/cmd/_go.mod" "$goroot.new/src/cmd/go.mod"
        mv "$goroot.new" "$goroot"
    fi
    export PATH=$goroot/bin:$PATH GOTOOLCHAIN=local
}

main() {
    local version minor folder wanted name
    local -a missing=()
    version=$(sed -n 's/^require k8s.io\/kubernetes //p' go.mod)
    minor=${version#v*.}
    folder=$root/$version
    wanted=$(cat go.mod go.sum build.sh | sha256sum | cut -d ' ' -f 1)
    need openssl openssl
    # Two runs at a time would build the same twice.
    mkdir -p "$folder"
    exec 9>"$root/lock"
    flock 9
    for name in "${!programs[@]}"; do
        if [ -n "${KUBEBUILDER_ASSETS:-}" ] && [ -x "$KUBEBUILDER_ASSETS/$name" ]; then
            continue
        fi
        if [ ! -x "$folder/$name" ] || [ "$(cat "$folder/.$name.from" 2>/dev/null)" != "$wanted" ]; then
            missing+=("$name")
        fi
    done
    if [ "${#missing[@]}" -eq 0 ]; then
        return
    fi
    prepare_go
    echo "cluster tools: building ${missing[*]} of Kubernetes $version in $folder: minutes, once"
    # Static, so that they run in any container, and without what only a debugger reads.
    export CGO_ENABLED=0 GOFLAGS=-mod=readonly
    local started information=k8s.io/component-base/version
    for name in "${missing[@]}"; do
        started=$SECONDS
        # A kube-proxy of no version says so in its metrics; nice, because minutes of two cores are felt.
        quietly nice -n 10 go build -trimpath -o "$folder/.$name" -ldflags "-s -w -X $information.gitVersion=$version
            -X $information.gitMajor=1 -X $information.gitMinor=${minor%%.*}" "${programs[$name]}"
        mv "$folder/.$name" "$folder/$name"
        printf '%s\n' "$wanted" >"$folder/.$name.from"
        printf 'cluster tools: %s, %s MB, in %s s\n' "$name" "$(du -m "$folder/$name" | cut -f 1)" \
            $((SECONDS - started))
    done
}

main
