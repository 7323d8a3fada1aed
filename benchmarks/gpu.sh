#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: tests, compute-sanitizer where it is found, benchmarks.
#
#   benchmarks/gpu.sh [folder for the results] [step …]      steps: tests sanitizer benchmarks decode profile
#
# Runs from a checkout, installed or not; PYTHON chooses the interpreter. Each step goes on after the failure of another;
# the exit code is 1 if one failed. The folder then holds environment.txt, a log per step, tests.xml, benchmarks.json,
# decode.jsonl, profile.json.
set -uo pipefail
results=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
shift || true
steps=${*:-tests sanitizer benchmarks decode profile}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
mkdir -p "$results"
failed=()

"$python" - <<'PYTHON' | tee "$results/environment.txt" || exit 1
import platform, sys
import torch

if not torch.cuda.is_available():
    sys.exit("gpu.sh: torch finds no CUDA device")
import transformers, triton

import layerskip_kernels as lk

gpu = torch.cuda.get_device_properties(0)
print(gpu.name, f"sm_{gpu.major}{gpu.minor}", f"{gpu.total_memory >> 20} MiB", f"{gpu.multi_processor_count} SMs")
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__,
      "transformers", transformers.__version__)
print(lk.backends())
PYTHON
git rev-parse HEAD >>"$results/environment.txt" 2>/dev/null

run() {  # name, command …
    local name=$1 started=$SECONDS
    shift
    "$@" 2>&1 | tee "$results/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed+=("$name (exit code $status)")
    echo "$name: exit code $status after $((SECONDS - started)) s" | tee -a "$results/environment.txt"
}

# The other tests import the compiled CPU library, which need not be built here.
mapfile -t tests < <(grep -lE '^(OP|BACKEND) = ' tests/test_*.py)
pytest=("$python" -m pytest -p no:cacheprovider -m gpu -q)

for step in $steps; do
    case $step in
    build)
        run build env LAYERSKIP_CUDA=1 "$python" setup.py build_ext --inplace
        "$python" -c "import layerskip_kernels as lk; print(lk.backends())" | tee -a "$results/environment.txt"
        ;;
    tests) run tests "${pytest[@]}" "${tests[@]}" --junitxml="$results/tests.xml" ;;
    sanitizer)
        sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
        if [ -z "$sanitizer" ]; then
            echo "sanitizer: compute-sanitizer not found" | tee -a "$results/environment.txt"
            continue
        fi
        # Views with canaries, ragged and masked windows, in each op: small, and all of a kernel's branches.
        for tool in memcheck racecheck; do
            run "sanitizer-$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
                "${pytest[@]}" "${tests[@]}" -k "strided or views or masks or scratch"
        done
        ;;
    benchmarks)
        run benchmarks "${pytest[@]}" benchmarks --benchmark-columns=median,iqr,rounds \
            --benchmark-json="$results/benchmarks.json"
        ;;
    decode)
        rm -f "$results/decode.jsonl"
        for backend in triton cuda; do
            for batch in 1 4 16 64; do
                for shape in "" "--shape llama3.2-1b" "--shape llama3-8b --exit_layer 4"; do
                    peers=
                    [ $backend = triton ] && peers=transformers  # once, beside either backend
                    [ $backend$batch = triton1 ] && peers="transformers compiled"
                    # shellcheck disable=SC2086  # several words each
                    run "decode-$backend-$batch${shape:+-${shape:8:9}}" "$python" benchmarks/decode_speed.py $shape \
                        --device cuda --backend $backend --batch $batch --peers $peers --num_speculations 2 4 6 \
                        --new_tokens 128 --rounds 3 --json "$results/decode.jsonl"
                done
            done
        done
        ;;
    profile) run profile "$python" benchmarks/profile_round.py --device cuda --json "$results/profile.json" ;;
    *) echo "gpu.sh: no step $step, choose build, tests, sanitizer, benchmarks, decode, profile" >&2 && exit 2 ;;
    esac
done

[ ${#failed[@]} = 0 ] || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
