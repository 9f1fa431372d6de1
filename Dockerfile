# SPDX-License-Identifier: Apache-2.0
# Two stages: pip runs in the first only. The image has Python, Debian's BCC (whose LLVM compiles the BPF programs in a
# short-lived child process) and kptrace; no C compiler, no kernel headers, no nft, no iptables, no shell scripts.
ARG BASE=docker.io/library/debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# System site-packages: BCC is the distribution's, PyPI has none. Nothing of pip is needed once kptrace is installed.
RUN python3 -m venv --system-site-packages /opt/kptrace \
    && /opt/kptrace/bin/python -m pip install --no-cache-dir --disable-pip-version-check . \
    && /opt/kptrace/bin/python -m pip uninstall --yes --disable-pip-version-check pip

FROM ${BASE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kptrace" \
      org.opencontainers.image.description="Packet look-up time and rule rewrite time of a Kubernetes node, for Prometheus" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-only"
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-bpfcc \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/kptrace /opt/kptrace
ENV PATH=/opt/kptrace/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
EXPOSE 10777
ENTRYPOINT ["kptrace"]
CMD ["run"]
