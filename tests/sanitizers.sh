#!/usr/bin/env bash
# Runs the tests of the CPU loops with the loops under AddressSanitizer and UBSan (GCC, Linux), in
# the environment that is active: bash tests/sanitizers.sh
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
# From a copy: setuptools would leave its objects in build/, for the next installation to take.
mkdir "$work/source"
cp -r pyproject.toml README.md LICENSE sync_splitbn "$work/source"
rm -f "$work"/source/sync_splitbn/_kernels/*.so
CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="$flags" \
    pip install --quiet --no-deps --no-cache-dir --target "$work" "$work/source"

library() { gcc -print-file-name="$1"; }
# ASan must come first, and finds the exceptions of libstdc++ only if it is loaded too.
export LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)"
# torch keeps what it allocates until the process ends.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$work" OMP_NUM_THREADS=2
(cd "$work" && python -c "
import sync_splitbn._kernels._cpu as loops
assert loops.__file__.startswith('$work'), loops.__file__
assert b'__asan_init' in open(loops.__file__, 'rb').read(), 'not compiled with the sanitizers'
")
# Not captured: what a sanitizer says would be lost with the process.
pytest --capture=no --timeout 600 "$@" tests/test_kernels.py tests/test_memory.py
