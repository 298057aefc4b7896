#!/usr/bin/env bash
# Installs what tests/slurm needs besides Python, on Debian or Ubuntu as root; without it those tests are skipped.
# No daemon is enabled for good: the tests start their own on loopback.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge libslurm-dev gcc libc6-dev shellcheck)
if dpkg-query --show "${packages[@]}" > /dev/null 2>&1; then
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null
