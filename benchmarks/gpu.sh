#!/usr/bin/env bash
# Tests, then benchmarks, on one GPU: from a plain checkout, without a network, in under 8 minutes.
#     bash benchmarks/gpu.sh [folder for the results]
# It uses the torch and triton that are installed (2.11 and 3.6, or newer).
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$out"
status=0

# not every box lets pip write: the checkout on the path is as good
python -m pip install --no-deps --no-build-isolation -q -e . || echo "pip failed: using PYTHONPATH"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())' || exit 1

timeout 200 python -m pytest -q tests/test_streaming.py 2>&1 | tee "$out/gpu_streaming_tests.txt" || status=1
timeout 100 python -m pytest -q -m gpu tests 2>&1 | tee "$out/gpu_tests.txt"
code=${PIPESTATUS[0]}
[ "$code" -eq 0 ] || [ "$code" -eq 5 ] || status=1 # 5: nothing is marked gpu

timeout 170 python benchmarks/bench_streaming.py --lengths 16384 131072 2048 32768 65536 4096 8192 \
    --save "$out/streaming.json" --plot "$out" || status=1
exit $status
