# syntax=docker/dockerfile:1
# The OpenAI gateway and the client's command line; neither PyTorch nor Triton is in it.
#     docker build -f docker/gateway.Dockerfile -t charonia-gateway .
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY engine engine
COPY kernels kernels
COPY client client
COPY model_repository model_repository
COPY docker/install.sh docker/install.sh
RUN --mount=type=cache,target=/root/.cache/pip docker/install.sh gateway /opt/charonia

FROM python:${PYTHON_VERSION}-slim
RUN useradd --uid 10001 --user-group --create-home charonia
COPY --from=build /opt/charonia /opt/charonia
ENV PATH=/opt/charonia/bin:$PATH
USER 10001:10001
WORKDIR /home/charonia
EXPOSE 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9000/health', timeout=4)"]
ENTRYPOINT ["charonia-client"]
CMD ["gateway", "--triton", "triton:8001", "--host", "0.0.0.0", "--port", "9000"]
