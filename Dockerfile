# The images of Pillion: `--target sidecar` and `--target operator`.
#
#   docker build --target sidecar  --build-arg TORCH_INDEX=<PyTorch's index of CPU wheels> -t pillion-sidecar .
#   docker build --target operator -t pillion-operator .
#
# BASE         a Python of 3.11 or newer; pin it by digest in production. Where it brings a torch (2.6 or newer), that one is used.
# TORCH_INDEX  the package index that torch is installed from; empty is the default index, whose torch for x86-64 is the CUDA build
#              (5 GB). The sidecar never computes, so a CPU build is all that it needs.
# PIP_*        pip's own settings, for a build behind a gateway.
#
# Files are copied rather than mounted into a step: not every builder looks at what is in a mount when it uses a layer again.
# Both run as 65532, with a read-only root file system: nothing is written outside of mounted volumes.

ARG BASE=python:3.13-slim

FROM ${BASE} AS wheels
ARG PIP_CERT
ARG PIP_INDEX_URL
WORKDIR /src
RUN python3 -m venv /build
COPY requirements/build.lock .
RUN /build/bin/pip install --quiet --no-cache-dir --require-hashes -r build.lock
COPY client client
COPY sidecar sidecar
COPY operator operator
RUN /build/bin/pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels ./client ./sidecar ./operator


FROM ${BASE} AS operator
ARG PIP_CERT
ARG PIP_INDEX_URL
RUN python3 -m venv /opt/pillion
COPY requirements/operator.lock /opt/pillion/
RUN /opt/pillion/bin/pip install --quiet --no-cache-dir --require-hashes -r /opt/pillion/operator.lock
COPY --from=wheels /wheels /opt/pillion/wheels
RUN /opt/pillion/bin/pip install --quiet --no-cache-dir --no-deps --no-index \
    /opt/pillion/wheels/pillion-*.whl /opt/pillion/wheels/pillion_operator-*.whl
ENV PATH=/opt/pillion/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["pillion-operator"]


FROM ${BASE} AS sidecar
ARG PIP_CERT
ARG PIP_INDEX_URL
ARG TORCH_INDEX
ARG TORCH=torch==2.15.0
RUN python3 -m venv --system-site-packages /opt/pillion
COPY requirements/sidecar.lock /opt/pillion/
RUN /opt/pillion/bin/pip install --quiet --no-cache-dir --require-hashes -r /opt/pillion/sidecar.lock
RUN /opt/pillion/bin/python -c "import torch" 2>/dev/null \
    || /opt/pillion/bin/pip install --quiet --no-cache-dir ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} "${TORCH}" numpy
COPY --from=wheels /wheels /opt/pillion/wheels
RUN /opt/pillion/bin/pip install --quiet --no-cache-dir --no-deps --no-index \
    /opt/pillion/wheels/pillion-*.whl /opt/pillion/wheels/pillion_sidecar-*.whl
# The demo's trainer, so that one image is enough to try it.
COPY examples /opt/pillion/examples
ENV PATH=/opt/pillion/bin:${PATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
CMD ["pillion-sidecar", "run"]
