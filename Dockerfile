# udpwatch for a node: Debian, its bcc, and the project in a virtual environment over Debian's Python.
# What fills the image, how to run it, and why as it is: docs/docker.md. Classic builder and BuildKit, amd64 and arm64.
ARG BASE=debian:13.8-slim

# ---- build: a virtual environment; pip and what it needs stay here ----
FROM ${BASE} AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
# bcc belongs to Debian's own interpreter, so the environment is made over that one and sees its packages.
RUN /usr/bin/python3 -m venv --system-site-packages /opt/udpwatch
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY agent agent
COPY bpf bpf
COPY dns dns
# The root is read-only in the end: what Python would compile at its first start is compiled here, and never checked again.
RUN /opt/udpwatch/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check -c constraints.txt . \
    && /opt/udpwatch/bin/pip uninstall -q -y pip setuptools \
    && /usr/bin/python3 -m compileall -q --invalidation-mode unchecked-hash /opt/udpwatch/lib

# ---- the image ----
FROM ${BASE}
# python3-bpfcc brings LLVM and clang as libraries, the only compiler here; iproute2 puts the DNS responder's address on lo.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-bpfcc iproute2 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf /var/cache/ldconfig /var/log/* \
    && mkdir /etc/udpwatch /run/udpwatch && mkdir --mode=0700 /var/cache/udpwatch
COPY --from=build /opt/udpwatch /opt/udpwatch
ENV PATH=/opt/udpwatch/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# No USER: Linux gives a container's capabilities to uid 0 alone (Kubernetes sets no ambient ones), and loading programs takes
# three. Everything else is taken away by whoever runs it: docs/docker.md, helm/udpwatch. `udpwatch dns` alone needs no root.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=20s CMD ["udpwatch", "doctor", "--agent"]
ENTRYPOINT ["udpwatch"]
CMD ["run"]
LABEL org.opencontainers.image.title="udpwatch" \
    org.opencontainers.image.description="Finds UDP replies that leave a node from another address than the one the client asked" \
    org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-only"
