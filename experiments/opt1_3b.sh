#!/usr/bin/env bash
# OPT-1.3b at the paper's settings. Masters and AdamW's moments take 16 GB in float32, so they are split over all eight
# cores, and every matrix over four (MESH, for another number of devices). See paper.sh for settings and variables.
exec bash "$(dirname "$0")/paper.sh" facebook/opt-1.3b --mesh "${MESH:-2x4}" --fsdp "$@"
