#!/usr/bin/env bash
# Installs Chromium, in which the tests open the page of `p2o view`, on Debian or Ubuntu as root.
set -euo pipefail

command -v chromium > /dev/null && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium > /dev/null
