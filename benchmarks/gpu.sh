#!/usr/bin/env bash
# Tests, then benchmarks, on one GPU: from a plain checkout, without a network, in under 8 minutes.
#     bash benchmarks/gpu.sh                # results to $OUT, or to benchmarks/results
#     bash benchmarks/gpu.sh --dry-run      # the same lines on a CPU, tiny; what it times means nothing
# It uses the torch and triton that are installed (2.11 and 3.6, or newer).
set -uo pipefail
cd "$(dirname "$0")/.."
dry=()
limit=200 # seconds of each part
if [ "${1:-}" = --dry-run ]; then
    dry=(--dry-run)
    limit=1800
    export FLEXSPARSE_DRY_RUN=1 TRITON_INTERPRET=1
fi
out=$(realpath -m "${OUT:-benchmarks/results}")
mkdir -p "$out"

# where pip cannot, the tree is laid out as it would be installed
if ! python -m pip install --no-deps --no-build-isolation -q -e .; then
    tree=$(mktemp -d)
    cp -r flexsparse tests benchmarks docs pyproject.toml "$tree" && cp -r masks "$tree/flexsparse/masks"
    cd "$tree" || exit 1
    export PYTHONPATH="$tree"
fi
python -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' || exit 1

# side by side: most of their time goes into compiling kernels
pytest=(python -m pytest -q -p no:cacheprovider --disable-warnings)
workers=() streaming_workers=()
if python -c 'import xdist'; then # twice as many for those that compile flex_attention
    workers=(-n $(($(nproc) / 2))) streaming_workers=(-n $(($(nproc) / 4)))
fi
alone=test_streaming_addresses_more_than_2_31_elements # it needs all of the memory
lengths=(16384 131072 2048 32768 65536 4096 8192)
timeout $limit "${pytest[@]}" "${workers[@]}" tests/test_gpu.py -k "not $alone" >"$out/gpu_tests.txt" 2>&1 &
gpu_tests=$!
timeout $limit "${pytest[@]}" "${streaming_workers[@]}" tests/test_streaming.py tests/test_streaming_schedule.py \
    >"$out/gpu_streaming_tests.txt" 2>&1 &
streaming_tests=$!
warming=()
if [ ${#dry[@]} = 0 ]; then
    for length in "${lengths[@]}"; do
        timeout $limit python benchmarks/bench_streaming.py --warm --lengths "$length" >/dev/null 2>&1 &
        warming+=($!)
    done
fi
status=0
wait "$gpu_tests" || status=1
wait "$streaming_tests" || status=1
# what is not in the caches by then is compiled when it is measured
[ ${#warming[@]} = 0 ] || wait "${warming[@]}"
timeout $((limit / 3)) "${pytest[@]}" tests/test_gpu.py -k "$alone" >>"$out/gpu_tests.txt" 2>&1 || status=1
tail -n 15 "$out/gpu_tests.txt" "$out/gpu_streaming_tests.txt"

timeout $limit python benchmarks/bench_streaming.py --seconds 150 --save "$out/streaming.json" --plot "$out" \
    --lengths "${lengths[@]}" "${dry[@]}" || status=1
exit "$status"
