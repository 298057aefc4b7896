#!/usr/bin/env bash
# How the templated groups are credited: the authors' setting, the anchored baseline, and mixed groups (our default).
#   examples/tiny_cpu/ablation.sh [SEED...]     default: seeds 1 2 3
exec bash "$(dirname "$0")/compare.sh" --output runs/ablation --arms "p2o_reference p2o_anchored p2o" "$@"
