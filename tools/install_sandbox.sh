#!/usr/bin/env bash
# Installs bubblewrap, in whose namespaces the reward `python` runs answers, on Debian or Ubuntu as root.
set -euo pipefail

command -v bwrap > /dev/null && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends bubblewrap > /dev/null
