#!/usr/bin/env bash
# Builds the `cpu` image with buildah and trains in it: no Docker daemon, no image registry. docs/docker.md has a run's log.
#   tools/build_image_check.sh [FOLDER]     root on Debian; apt-get install buildah debootstrap; a few GB in FOLDER
# P2O_BUILD_OPTIONS   more options of `buildah bud`, e.g. for a package index: --volume /etc/pip.conf:/etc/pip.conf:ro
# P2O_DEBIAN_MIRROR   default: http://deb.debian.org/debian
set -euo pipefail
cd "$(dirname "$0")/.."

folder="$(realpath "${1:-build/image}")"
mkdir -p "$folder"
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
buildah=(buildah --root "$folder/storage" --runroot "$folder/run")
say() { echo "build_image_check: $(date +%T) $*"; }

if [ ! -x "$folder/debian/bin/bash" ]; then
    say "debootstrap"
    debootstrap --variant=minbase bookworm "$folder/debian" "${P2O_DEBIAN_MIRROR:-http://deb.debian.org/debian}" \
        > "$folder/debootstrap.log"
fi
say "base image of $(du -sh "$folder/debian" | cut -f1)"
base="$("${buildah[@]}" from scratch)"
"${buildah[@]}" copy --quiet "$base" "$folder/debian" / > /dev/null
"${buildah[@]}" commit --quiet --rm "$base" localhost/debian-minbase > /dev/null

say "building the cpu target"
# shellcheck disable=SC2086  # several options in one variable
"${buildah[@]}" bud --layers --target cpu --build-arg CPU_BASE_IMAGE=localhost/debian-minbase ${P2O_BUILD_OPTIONS:-} \
    --tag localhost/megatron-p2o:cpu .

say "training in it"
container="$("${buildah[@]}" from localhost/megatron-p2o:cpu)"
"${buildah[@]}" run "$container" -- p2o doctor --strict
"${buildah[@]}" run "$container" -- bash examples/tiny_cpu/compare.sh --output runs/quickstart --arms p2o 1
"${buildah[@]}" rm "$container" > /dev/null
say "done: $("${buildah[@]}" images --format '{{.Size}}' localhost/megatron-p2o:cpu)"
