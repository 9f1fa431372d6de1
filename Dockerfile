# SPDX-License-Identifier: Apache-2.0
# The image has Python, Debian's BCC (whose LLVM compiles the BPF programs in a short-lived child process) and kptrace; no
# pip, no C compiler, no kernel headers, no nft, no iptables, no shell scripts.
# Pin it by digest where builds must repeat: --build-arg BASE=docker.io/library/debian@sha256:...
ARG BASE=docker.io/library/debian:trixie-slim

FROM ${BASE} AS dependencies
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-setuptools python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
# System site-packages: BCC is the distribution's, PyPI has none. pip works from outside, so that nothing of it stays.
RUN python3 -m venv /opt/pip && python3 -m venv --system-site-packages --without-pip /opt/kptrace
WORKDIR /src
# What kptrace needs comes before kptrace: these layers stay while only the code changes. The secrets are the builder's
# own pip configuration and certificates (tools/image.sh has the machine's); without them pip asks its default index.
COPY setup.cfg .
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=pip_ca,target=/run/pip-ca.crt \
    python3 -c 'import configparser; c = configparser.ConfigParser(); c.read("setup.cfg"); print(c["options"]["install_requires"])' \
        >requirements.txt \
    && /opt/pip/bin/pip --python /opt/kptrace/bin/python install --no-cache-dir --disable-pip-version-check \
        --requirement requirements.txt

FROM dependencies AS build
COPY . .
# Debian's setuptools builds it, so that nothing is downloaded here.
RUN /opt/pip/bin/pip --python /opt/kptrace/bin/python install --no-cache-dir --disable-pip-version-check --no-index \
        --no-deps --no-build-isolation --prefix /opt/own .

# Has a name, so that the test machines (tools/vm/Dockerfile) are built on the very same layers.
FROM ${BASE} AS runtime
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-bpfcc \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/cache/ldconfig/* /var/log/apt /var/log/dpkg.log
COPY --from=dependencies /opt/kptrace /opt/kptrace
ENV PATH=/opt/kptrace/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

FROM runtime
# The one layer that differs between two versions of kptrace with the same dependencies.
COPY --from=build /opt/own /opt/kptrace
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="kptrace" \
      org.opencontainers.image.description="Packet look-up time and rule rewrite time of a Kubernetes node, for Prometheus" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-only"
EXPOSE 10777
ENTRYPOINT ["kptrace"]
CMD ["run"]
