#!/usr/bin/env bash
# Puts uPlot, the chart library of the page of `p2o view`, beside our own scripts: as npm has it, with its licence. Fetches
# nothing where the pinned files are there already. Another version: change the three pins below.
set -euo pipefail
cd "$(dirname "$0")/.."

version=1.6.32
integrity=sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==
hashes="\
19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f  uPlot.iife.min.js
df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04  uPlot.min.css
8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd  uPlot.LICENSE.txt"
vendor="$PWD/megatron_p2o/view/assets/vendor"

are_pinned() { (cd "$1" && sha256sum --check --status <<< "$hashes" 2> /dev/null); }

if are_pinned "$vendor"; then
    echo "uPlot $version is there"
    exit 0
fi
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
(cd "$folder" && npm pack --silent "uplot@$version" > /dev/null)
package="$folder/uplot-$version.tgz"
got="sha512-$(openssl dgst -sha512 -binary "$package" | base64 -w0)"
if [ "$got" != "$integrity" ]; then
    echo "uplot@$version is $got, not the pinned $integrity: nothing is changed" >&2
    exit 1
fi
tar -xzf "$package" -C "$folder"
mkdir "$folder/vendor"
cp "$folder/package/dist/uPlot.iife.min.js" "$folder/package/dist/uPlot.min.css" "$folder/vendor"
cp "$folder/package/LICENSE" "$folder/vendor/uPlot.LICENSE.txt"
if ! are_pinned "$folder/vendor"; then
    echo "the files of uplot@$version are not the pinned ones: nothing is changed" >&2
    exit 1
fi
mkdir -p "$vendor"
cp "$folder"/vendor/* "$vendor"
echo "uPlot $version is in ${vendor#"$PWD/"}"
