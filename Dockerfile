# syntax=docker/dockerfile:1
#
#   docker build --target cpu  -t deltamux:cpu .
#   docker build --target cuda -t deltamux:cuda .
#
#   docker run --rm -p 127.0.0.1:8000:8000 --shm-size 128m -v deltamux:/data -v ./my-backbone:/backbone:ro \
#       deltamux:cpu serve --backbone /backbone --host 0.0.0.0 --insecure
#
# Inside a container the server must listen beyond the container's own loopback, which it refuses without --insecure:
# publish the port on the host's loopback only, as above, or put something that authenticates in front of it.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS sources
WORKDIR /opt/deltamux
COPY pyproject.toml constraints.txt README.md ./
COPY adapters adapters
COPY serving serving
COPY loadtest loadtest
COPY deploy deploy
RUN python -m venv /opt/venv
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch first: where its wheels without CUDA are on an index of their own (--build-arg TORCH_INDEX=URL), that index must
# not answer for anything else
FROM sources AS build-cpu
ARG TORCH_INDEX
RUN torch="$(grep '^torch==' constraints.txt)" \
 && /opt/venv/bin/pip install --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${torch}" \
 && /opt/venv/bin/pip install -c constraints.txt -e .

FROM sources AS build-cuda
RUN /opt/venv/bin/pip install -c constraints.txt -e .

FROM python:${PYTHON}-slim AS runtime
# an init, because Ray's processes leave children behind that somebody has to reap
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 deltamux \
 && install -d -o deltamux -g deltamux /data
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    DELTAMUX_STORE__PATH=/data/blobs DELTAMUX_DATABASE__URL=sqlite:////data/registry.db
USER deltamux
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=8)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "deltamux"]
CMD ["serve"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/venv /opt/venv
COPY --from=build-cuda /opt/deltamux /opt/deltamux

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=build-cpu /opt/deltamux /opt/deltamux
