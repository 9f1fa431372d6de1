#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the container image `kptrace` from the Dockerfile, with buildah and without a container engine.
# Usage: tools/image.sh [arguments for buildah bud, such as --build-arg BASE=debian:trixie-slim]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v buildah >/dev/null; then
    echo "image: buildah is missing: apt-get install buildah, or build the Dockerfile with any other builder" >&2
    exit 1
fi
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' kptrace/__init__.py)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
exec buildah bud --isolation chroot --layers --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
    --tag "kptrace:$version" --tag kptrace:latest "$@" .
