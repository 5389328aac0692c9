#!/usr/bin/env bash
# DeepSpeed's build imports the torch that experiments.yaml installs, so it comes after it.
set -euo pipefail
DS_BUILD_OPS=0 python -m pip install --quiet --no-build-isolation --no-deps deepspeed==0.19.8
