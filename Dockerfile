# Images of megatron-p2o. `docker build --target cpu .` or `docker build --target gpu .`
# Pin the bases by digest for a release: --build-arg GPU_BASE_IMAGE=docker.io/lmsysorg/sglang@sha256:...
ARG CPU_BASE_IMAGE=docker.io/library/debian:bookworm-slim
ARG GPU_BASE_IMAGE=docker.io/lmsysorg/sglang:v0.5.21

# ---- cpu: the pinned set of requirements/cpu.txt on CPython 3.11
FROM ${CPU_BASE_IMAGE} AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap ca-certificates libgomp1 libnuma1 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/venv/bin:$PATH OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
WORKDIR /opt/megatron-p2o
COPY requirements/cpu.txt requirements/cpu.txt
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && pip install setuptools==80.9.0 wheel==0.45.1 \
    && PIP_EXTRA_INDEX_URL="${TORCH_INDEX_URL}" pip install "torch==${TORCH_VERSION}" \
    && pip install --no-deps -r requirements/cpu.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && p2o doctor --strict --require "torch==${TORCH_VERSION}"

# ---- gpu: SGLang's image (CPython 3.12, CUDA 13) with Megatron-core and what is compiled against its torch
FROM ${GPU_BASE_IMAGE} AS gpu
ARG TORCH_VERSION=2.13.0
ARG SGLANG_VERSION=0.5.21
ARG MEGATRON_CORE_VERSION=0.16.1
ARG TRANSFORMER_ENGINE_VERSION=2.17.0
ARG FLASH_ATTN_VERSION=2.8.3
ARG CUDNN_VERSION=9.22.0.52
ARG INSTALL_FLASH_ATTN=1
ARG INSTALL_APEX=0
ARG APEX_COMMIT=10417ac
ARG MAX_JOBS=16
# The base's Python may be Ubuntu's own, which pip changes only when told to.
ENV NVTE_CUDA_ARCHS=90 TORCH_CUDA_ARCH_LIST=9.0 FLASH_ATTN_CUDA_ARCHS=90 NVTE_FRAMEWORK=pytorch PYTHONUNBUFFERED=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/megatron-p2o
# The extension is compiled here, because a published wheel fits another torch, and with the headers of torch's own CUDA
# packages: the toolkit may hold no cusparse.h, and a system's cuDNN would be found before pip's. Expert parallelism over
# NCCL needs a newer NCCL and is not used.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ninja==1.13.0 pybind11==3.0.1 setuptools==80.9.0 wheel==0.45.1 \
    && pip install --no-deps onnx==1.19.1 onnx_ir==0.1.12 onnxscript==0.5.6 nvdlfw-inspect==0.2.2 \
    && nvidia="$(python3 -c 'import nvidia; print(nvidia.__path__[0])')" \
    && CPATH="${nvidia}/cudnn/include:${nvidia}/nccl/include:${nvidia}/cu13/include" CUDNN_PATH="${nvidia}/cudnn" \
        NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 MAX_JOBS="${MAX_JOBS}" \
        pip install --no-deps --no-build-isolation \
        "transformer-engine==${TRANSFORMER_ENGINE_VERSION}" "transformer-engine-cu13==${TRANSFORMER_ENGINE_VERSION}" \
        "transformer-engine-torch==${TRANSFORMER_ENGINE_VERSION}"
# For layers without Transformer Engine (model.layer_backend: local), whose attention is torch's without it.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "${INSTALL_FLASH_ATTN}" = 1 ]; then \
        MAX_JOBS="${MAX_JOBS}" FLASH_ATTENTION_FORCE_BUILD=TRUE \
            pip install --no-deps --no-build-isolation "flash-attn==${FLASH_ATTN_VERSION}"; \
    fi
# NVIDIA's apex, which is not the package of that name on PyPI: fused weight gradients of the LM head.
RUN if [ "${INSTALL_APEX}" = 1 ]; then \
        MAX_JOBS="${MAX_JOBS}" APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-deps --no-build-isolation \
            "apex @ git+https://github.com/NVIDIA/apex@${APEX_COMMIT}"; \
    fi
# For the reward `python`, which runs answers in namespaces.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
COPY requirements/gpu.txt requirements/gpu.txt
# cuDNN last: installing others drags it down, and fused attention then fails with CUDNN_STATUS_BAD_PARAM.
RUN pip install --no-cache-dir --no-deps "megatron-core==${MEGATRON_CORE_VERSION}" -r requirements/gpu.txt \
    && pip install --no-cache-dir --no-deps "nvidia-cudnn-cu13==${CUDNN_VERSION}"
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && p2o doctor --strict --require "torch==${TORCH_VERSION}" --require "sglang==${SGLANG_VERSION}" \
        --require "megatron-core==${MEGATRON_CORE_VERSION}" --require torch-memory-saver \
        --require "transformer-engine==${TRANSFORMER_ENGINE_VERSION}" --require "nvidia-cudnn-cu13==${CUDNN_VERSION}" \
        --require triton --require sglang-kernel --require flashinfer-python
