# docker build -t deltaserve .
# docker run --gpus all -p 9000:9000 -p 9400:9400 -v deltaserve-cache:/cache deltaserve serve BACKBONE --insecure
# docker run --rm deltaserve demo
#
# torch brings the CUDA libraries it was built with; the image has to match in the major version and to carry a driver stack.
ARG CUDA=nvidia/cuda:13.0.2-runtime-ubuntu24.04

FROM ${CUDA} AS builder
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3.12 -m venv /opt/deltaserve \
    && /opt/deltaserve/bin/python -m pip wheel --no-deps --wheel-dir /wheel .
# The environment is at the same place in the final image: its scripts name their interpreter by path.
RUN /opt/deltaserve/bin/python -m pip install --constraint constraints.txt ${PIP_ARGS} "$(echo /wheel/deltaserve-*.whl)[server]"

FROM ${CUDA}
# gcc and Python's headers: Triton compiles the launcher of each kernel at its first use.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 python3.12-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home deltaserve \
    && install --directory --owner deltaserve --group deltaserve /cache
COPY --from=builder /opt/deltaserve /opt/deltaserve
ENV PATH=/opt/deltaserve/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    DELTASERVE_HOST=0.0.0.0
USER deltaserve
WORKDIR /home/deltaserve
VOLUME /cache
# gRPC, Prometheus
EXPOSE 9000 9400
# A large backbone takes minutes to load; failures before the start period is over do not count.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["deltaserve", "doctor", "--grpc", "127.0.0.1:9000"]
ENTRYPOINT ["deltaserve"]
CMD ["serve", "--help"]
