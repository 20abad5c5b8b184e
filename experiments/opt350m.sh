#!/usr/bin/env bash
# OPT-350m at the paper's settings; data parallel over all devices. See paper.sh for settings and variables.
exec bash "$(dirname "$0")/paper.sh" facebook/opt-350m "$@"
