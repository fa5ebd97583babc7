#!/usr/bin/env bash
# Set up and run the tests: bash scripts/test.sh [--all] [pytest arguments]
#
# Without --all the quick suite. With it everything: the slow tests too, and the statistical ones with all of their draws. The numerical
# tests (tests/law, tests/model) run first, at quick size, as on a processor with fewer instructions than this one, so that no
# tolerance is tuned to its kernels. Where they fail, that is the end; otherwise the closing line is that of everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
source scripts/setup.sh
ruff check .
ruff format --check .
mypy
tests=(python -m pytest -n "${ASARM_TEST_WORKERS:-2}" --dist worksteal "$@")
if [[ " $* " == *" --all "* ]]; then
    native=$(python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')
    case $native in
        AVX512*) fewer=(ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2) ;;
        AVX2) fewer=(ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2) ;;
        *) fewer=() ;; # no other kernels to choose from
    esac
    if [ ${#fewer[@]} -gt 0 ]; then
        echo "test: the numerical tests with ${fewer[*]}, then everything with $native"
        status=0
        env "${fewer[@]}" "${tests[@]}" --numerical || status=$?
        [ "$status" -eq 0 ] || [ "$status" -eq 5 ] || exit "$status" # 5: no numerical test among those asked for
    fi
fi
exec "${tests[@]}"
