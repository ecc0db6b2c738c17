# hdovd in a container, for CPUs or for NVIDIA GPUs:
#   docker build --tag hdovd .
#   docker build --tag hdovd:cuda --build-arg TORCH=cu128 .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/work" hdovd:cuda detect run photos --out found
# TORCH: what uv's --torch-backend takes. EXTRAS: of pyproject.toml.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS base
RUN useradd --create-home --uid 1000 --shell /bin/bash hdovd && install --directory --owner hdovd /work
ENV PATH=/opt/hdovd/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /work

FROM base AS build
ARG TORCH=cpu
ARG EXTRAS=video,serve,hub,parquet,s3,ray,submitit
RUN pip install --no-cache-dir uv==0.13.9 && python -m venv /opt/hdovd
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY hdovd hdovd
COPY cache cache
COPY cli cli
COPY pipelines pipelines
RUN uv pip install --no-cache --python /opt/hdovd/bin/python --torch-backend "${TORCH}" ".[${EXTRAS}]"

# For .devcontainer: the tools of `make setup`, which makes its own environment.
FROM base AS dev
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
USER 1000

FROM base
COPY --from=build /opt/hdovd /opt/hdovd
USER 1000
ENTRYPOINT ["hdovd"]
CMD ["--help"]
