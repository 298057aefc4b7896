# Sourced by scripts of this folder, from the repository's folder: the versions of the Dockerfile's gpu target, written there once.
# shellcheck shell=bash disable=SC2034
version() { sed -n "s/^ARG $1=//p" Dockerfile | sort -u; }
# Those of its RUN lines.
mapfile -t pins < <(grep -oE '[A-Za-z0-9_-]+==[0-9][A-Za-z0-9.]*' <(sed -n '/AS gpu/,$p' Dockerfile) | sort -u)
base=("torch==$(version TORCH_VERSION)" "sglang==$(version SGLANG_VERSION)")
cudnn="nvidia-cudnn-cu13==$(version CUDNN_VERSION)"
# The part for torch is compiled.
engine=("transformer-engine==$(version TRANSFORMER_ENGINE_VERSION)"
    "transformer-engine-cu13==$(version TRANSFORMER_ENGINE_VERSION)")
engine_torch="transformer-engine-torch==$(version TRANSFORMER_ENGINE_VERSION)"
flash_attn="flash-attn==$(version FLASH_ATTN_VERSION)"
megatron="megatron-core==$(version MEGATRON_CORE_VERSION)"
