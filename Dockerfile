# vllm-unified on top of vLLM's own image, GPU or CPU. ./build.sh builds and tries it; `docker build .` works too.
#
# One container with several processes, because they are one service: the engines share devices and have to start one
# after the other on each, and the router has to know which of them is up. supervisord and the keepers see to that.

# As in scripts/versions.env.
ARG BASE_IMAGE=vllm/vllm-openai:v0.32.0

FROM $BASE_IMAGE AS wheel
USER root
WORKDIR /build
COPY scripts/install_into_image scripts/
COPY LICENSE README.md pyproject.toml ./
COPY vllm_unified vllm_unified
RUN --mount=type=secret,id=pip.conf,target=/build/pip.conf --mount=type=secret,id=ca,target=/build/ca \
    scripts/install_into_image wheel

FROM $BASE_IMAGE AS demo
USER root
WORKDIR /build
COPY scripts/install_into_image scripts/make_demo_models.py scripts/versions.env scripts/
COPY demo/chat demo/chat
COPY demo/ocr demo/ocr
RUN --mount=type=secret,id=pip.conf,target=/build/pip.conf --mount=type=secret,id=ca,target=/build/ca \
    scripts/install_into_image demo

FROM $BASE_IMAGE
USER root
RUN --mount=type=tmpfs,target=/tmp \
    --mount=type=bind,source=scripts/install_into_image,target=/build/install_into_image \
    --mount=type=bind,source=pyproject.toml,target=/build/pyproject.toml \
    --mount=type=bind,source=requirements.lock,target=/build/requirements.lock \
    --mount=type=secret,id=pip.conf,target=/build/pip.conf --mount=type=secret,id=ca,target=/build/ca \
    /build/install_into_image dependencies
RUN --mount=type=tmpfs,target=/tmp \
    --mount=type=bind,source=scripts/install_into_image,target=/build/install_into_image \
    --mount=type=bind,from=demo,source=/build/models,target=/build/models \
    /build/install_into_image demo_models
RUN --mount=type=tmpfs,target=/tmp \
    --mount=type=bind,source=scripts,target=/build/scripts \
    --mount=type=bind,source=config,target=/build/config \
    --mount=type=bind,source=monitoring,target=/build/monitoring \
    --mount=type=bind,from=wheel,source=/build/dist,target=/build/dist \
    /build/scripts/install_into_image package

# HOME and USER also for a uid that the image has no name for, as with `docker run --user`.
# Inside, everything listens; which port of the host leads there is said where it is published.
ENV HOME=/app USER=vllm-unified VLLM_UNIFIED_HOME=/app VLLM_UNIFIED_RUNTIME=docker \
    VLLM_ROUTER_HOST=0.0.0.0 VLLM_ENGINE_HOST=0.0.0.0
WORKDIR /app

ARG DOWNLOAD_MODELS=false
ARG HF_ENDPOINT=
ARG MODELSCOPE_ENDPOINT=
RUN --mount=type=tmpfs,target=/tmp \
    --mount=type=bind,source=scripts/install_into_image,target=/build/install_into_image \
    --mount=type=secret,id=ca,target=/build/ca,mode=0444 --mount=type=secret,id=hf_token,target=/build/hf_token \
    /build/install_into_image models

USER 1000:0
# 8010, of the document service, is reached through the router.
EXPOSE 8000 8001 8002 8003 8004
# The start period is router.startup_timeout: large weights take minutes.
HEALTHCHECK --interval=10s --timeout=20s --start-period=30m --retries=3 CMD ["vllm-unified", "health", "--ready"]
# supervisord lets requests in flight end; docker-compose.yml says how long that may take.
STOPSIGNAL SIGTERM
ENTRYPOINT ["vllm-unified-entrypoint"]
CMD ["supervisord", "--nodaemon", "--configuration", "/app/run/supervisord.conf"]

# Last, because they differ in each build.
ARG VERSION=
ARG REVISION=
ARG SOURCE=
ARG BASE_IMAGE
LABEL vllm-unified="$VERSION" \
      org.opencontainers.image.title="vllm-unified" \
      org.opencontainers.image.description="Chat, embedding, rerank and OCR models, each on its own vLLM server, behind one OpenAI-compatible address" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.base.name="$BASE_IMAGE"
