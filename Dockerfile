# syntax=docker/dockerfile:1
# One image for the job, the Dask scheduler and the workers. The environment says everything:
#   docker run --gpus all -e MODEL=... -e S3_PATH=... -e START_LAYER=17 -e END_LAYER=43 inkdask
#
# GPU:  docker build -t inkdask .
# CPU:  docker build -t inkdask:cpu --build-arg BASE_IMAGE=python:3.11-slim \
#         --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
#
# The base brings Python 3.11 or newer with pip. Where it brings PyTorch, that one is used, and where
# that one is built for CUDA, the packages for GPUs are added. torch.compile needs a C compiler: the
# CUDA base has one, and without one the network runs uncompiled.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

FROM ${BASE_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL
ENV PIP_CONSTRAINT=/build/constraints.txt \
    PIP_BUILD_CONSTRAINT=/build/constraints.txt \
    PIP_NO_CACHE_DIR=1
WORKDIR /build

# The dependencies change rarely: a layer of their own, of a package that is still empty.
COPY pyproject.toml constraints.txt ./
RUN mkdir -p inkdask cluster/base \
 && touch README.md LICENSE inkdask/__init__.py cluster/base/dask-cluster.yaml \
 && extras=kubernetes,viz \
 && if python3 -c "import torch; assert torch.version.cuda" 2>/dev/null; then extras=cuda,$extras; fi \
 && python3 -m venv --without-pip --system-site-packages /opt/inkdask \
 && python3 -m pip --python /opt/inkdask/bin/python install ".[$extras]"

COPY README.md LICENSE ./
COPY cluster/base/dask-cluster.yaml cluster/base/
COPY inkdask ./inkdask
RUN python3 -m pip --python /opt/inkdask/bin/python install --no-deps --force-reinstall .


FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="inkdask" \
      org.opencontainers.image.description="Ink detection on Herculaneum surface volumes" \
      org.opencontainers.image.licenses="MIT"

# A number, because Kubernetes must see that it is not root; the root file system may be read-only.
# Only /tmp is written, by any user. /tmp/cache is worth a volume: it keeps weights and compiled kernels.
RUN groupadd --gid 10001 inkdask \
 && useradd --uid 10001 --gid inkdask --no-create-home --home-dir /tmp inkdask \
 && install --directory --mode=1777 /tmp/cache
ENV PATH=/opt/inkdask/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    HF_HOME=/tmp/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    CUPY_CACHE_DIR=/tmp/cache/cupy
COPY --from=build /opt/inkdask /opt/inkdask

USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["inkdask"]
CMD ["run"]
