# syntax=docker/dockerfile:1
# Triton Inference Server with Charonia: `charonia serve`, and the backends `charonia` and `vllm`.
#     docker build -f docker/server.Dockerfile -t charonia-server .
# Releases from 24.11 on have the Python 3.12 that is needed.
ARG TRITON_RELEASE=26.06

FROM nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3 AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY engine engine
COPY kernels kernels
COPY client client
COPY model_repository model_repository
COPY docker/install.sh docker/install.sh
RUN --mount=type=cache,target=/root/.cache/pip docker/install.sh server /opt/charonia

FROM nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3
# The kernels' compiler builds a small launcher in C. tini is process 1: it reaps what ended servers leave behind.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libpython3-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home charonia \
    && install -d -o charonia -g charonia /cache
COPY --from=build /opt/charonia /opt/charonia
RUN /opt/charonia/bin/charonia install-backend /opt/tritonserver/backends
# Stubs run the first python3 on PATH. All that is written lies in /cache and /tmp, so the root can be read-only.
ENV PATH=/opt/charonia/bin:$PATH \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    NUMBA_CACHE_DIR=/cache/numba
USER 10001:10001
WORKDIR /home/charonia
VOLUME /cache
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["curl", "-fsS", "http://127.0.0.1:8000/v2/models/llm/ready"]
# The gateway is a container of its own; `--gateway-port=9000` among a container's arguments starts one here as well.
ENTRYPOINT ["tini", "--", "charonia", "serve", "--host=0.0.0.0", "--gateway-port=0"]
CMD ["/model"]
