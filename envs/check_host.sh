#!/bin/sh
# Says in one line what this machine lacks, with the packages to install. Fails only for what nothing works without.
set -eu
python="${1:-python3}"
case "${python##*/}" in # Debian's packages are named after the version that is asked for
    python3.*) package="${python##*/}" ;;
    *) package=python3 ;;
esac

if ! command -v "$python" >/dev/null; then
    echo "set-up: no $python here; install it with: apt-get install $package $package-venv" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "set-up: Python 3.11 or newer is needed, $("$python" -V) is here; name another with: make PYTHON=python3.12" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "set-up: Python's venv module is missing; install it with: apt-get install $package-venv" >&2
    exit 1
fi

missing=""
command -v g++ >/dev/null || missing="$missing g++"
"$python" - <<'PY' || missing="$missing $package-dev"
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
PY
# Snakemake's immutables has no wheel for them: it is compiled
if [ -n "$missing" ] && ! "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 14))'; then
    echo "set-up: Python 3.14 and newer need a compiler and headers here; install them with: apt-get install$missing;" \
        "or name another with: make PYTHON=python3.12" >&2
    exit 1
fi
[ -e /usr/include/libaio.h ] || missing="$missing libaio-dev"
if [ -n "$missing" ]; then
    echo "set-up: without$missing DeepSpeed's disk offload cannot be built, and deepspeed_nvme will be reported as" \
        "unsupported; to have it: apt-get install$missing" >&2
fi
