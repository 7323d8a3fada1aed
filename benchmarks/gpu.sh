#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call, the most telling first:
#
#   benchmarks/gpu.sh FOLDER [step …]
#
#   build       the compiled libraries, for the GPU at hand, into this checkout; needs nvcc, cmake, ninja and pybind11
#   check       decoding with the CUDA kernels; where it fails, without overlapping launches, then without CUDA graphs: what
#               helps is left off in all that follows
#   tests       of the CUDA kernels, then of the Triton kernels
#   decode      with the CUDA kernels, the 1B and the 8B shape at batch 1, the former also one launch after the other
#   profile     of a round of the 1B shape, also one launch after the other
#   benchmarks  of every op
#   decode-more the demo model too, batches up to 64, the Triton kernels, transformers compiled
#   sanitizer   compute-sanitizer over the CUDA kernels, where it is found
#
# FOLDER, which OUT may name instead, gets summary.txt and results.tgz: logs, junit files, figures. Both are written
# after every run, so a call that ends early, killed or by Ctrl-C, has left what it did. A failure ends nothing but
# itself, and makes the exit code 1; without the CUDA kernels nothing is run.
#
# PYTHON chooses the interpreter, JOBS how many test files run at once (12, or one per processor if those are fewer).
# CMAKE_ARGS="-DLAYERSKIP_CPU_VARIANTS=scalar" shortens the build, and slows the CPU library down. What takes longer than
# these seconds is cut:
: "${JOBS:=$(($(nproc) < 12 ? $(nproc) : 12))}"
: "${BUILD_SECONDS:=300}"
: "${TESTS_SECONDS:=240}"  # a file
: "${DECODE_SECONDS:=90}"  # a model
: "${BENCHMARKS_SECONDS:=60}"  # a file
: "${PROFILE_SECONDS:=60}"
: "${SANITIZER_SECONDS:=120}"  # a tool

set -uo pipefail
out=${1:-${OUT:-}}
[ -n "$out" ] || { echo "gpu.sh: name a folder for the results" >&2; exit 2; }
out=$(realpath -m "$out")
shift || true
known="build check tests decode profile benchmarks decode-more sanitizer"
steps=${*:-$known}
for step in $steps; do
    [[ " $known " == *" $step "* ]] || { echo "gpu.sh: no step $step, choose ${known// /, }" >&2; exit 2; }
done
cd "$(dirname "$0")/.." || exit
export PYTHON=${PYTHON:-python3} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin PYTEST_ADDOPTS="-p no:cacheprovider -m gpu --tb=short" TESTS_SECONDS
unset TRITON_INTERPRET

capability=$("$PYTHON" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu.sh: torch finds no CUDA device")
print(*torch.cuda.get_device_capability(), sep="")
') || exit 1
export LAYERSKIP_CUDA=1 LAYERSKIP_CUDA_ARCHS=${LAYERSKIP_CUDA_ARCHS:-$capability}

mkdir -p "$out"
summary=$out/summary.txt work=$(mktemp -d) failed=() job=
export work
git rev-parse HEAD >"$summary" 2>/dev/null || echo "no git checkout" >"$summary"

save() {
    cp "$summary" "$work" && tar -czf "$work.tgz" -C "$work" . && mv "$work.tgz" "$out/results.tgz"
}

finish() {
    if [ -n "$job" ]; then  # tests write down what they did
        kill -INT -- "-$job" && sleep 3
        kill -KILL -- "-$job"
    fi 2>/dev/null
    save
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

run() {  # name, command …
    local name=$1 started=$SECONDS status=0
    shift
    echo "$name"
    set -m  # in a process group of its own, which ends as a whole
    "$@" >"$work/$name.log" 2>&1 </dev/null &
    job=$!
    set +m
    wait "$job" || status=$?
    kill -KILL -- "-$job" 2>/dev/null  # what a killed one has left behind
    job=
    [ $status = 0 ] || failed+=("$name")
    tail -n 40 "$work/$name.log" | tee -a "$summary"
    echo "$name: exit code $status after $((SECONDS - started)) s" | tee -a "$summary"
    save
    return $status
}

without() {  # what is switched off, for names
    echo "${LAYERSKIP_PDL:+-pdl$LAYERSKIP_PDL}${LAYERSKIP_GRAPHS:+-graphs$LAYERSKIP_GRAPHS}"
}

limited() {  # seconds, command …; tests that are interrupted write down what they did
    timeout --foreground --signal=INT --kill-after=20 "$@"
}

# A file of tests, a process: an illegal address in a kernel breaks all that its process does after.
test_file() {  # backend, file
    local log status=0
    log=$work/tests-$1/$(basename "$2" .py)
    limited "$TESTS_SECONDS" "$PYTHON" -m pytest -v --backend "$1" --junitxml="$log.xml" "$2" >"$log.log" 2>&1 ||
        status=$?
    echo "$(basename "$2"): $(tail -n 1 "$log.log"), exit code $status"
    [ $status = 0 ] || [ $status = 5 ]  # 5: none for this backend
}
export -f limited test_file

first() {  # files …; then those of stdin, each once
    { printf '%s\n' "$@" && cat; } | awk '!seen[$0]++'
}
mapfile -t test_files < <(grep -lE '^(BACKEND|OP) = ' tests/test_*.py |
    first tests/test_{kernels_decode,decode_captured}.py `# decoding from end to end` \
        tests/test_{exit_head,verify_attention}.py)  # and what takes longest
mapfile -t benchmark_files < <(grep -lw device benchmarks/bench_*.py |
    first benchmarks/bench_{small_linear,verify_attention,exit_head}.py)

tests() {  # backend
    mkdir "$work/tests-$1"
    printf '%s\n' "${test_files[@]}" >"$work/tests-$1/files.txt"
    # shellcheck disable=SC2016  # bash -c expands it
    run "tests-$1" xargs -a "$work/tests-$1/files.txt" -P "$JOBS" -I{} bash -c 'test_file "$@"' _ "$1" {}
}

check() {
    run "check$(without)" limited "$TESTS_SECONDS" "$PYTHON" -m pytest -q --backend cuda \
        tests/test_{kernels_decode,decode_captured}.py
}

bench() {  # name, file, options …
    local name=$1 file=$2
    shift 2
    run "$name" limited "$BENCHMARKS_SECONDS" "$PYTHON" -m pytest -q --benchmark-columns=median,iqr,rounds \
        --benchmark-json="$work/$name.json" "$file" "$@"
}

profile() {
    local name
    name=profile$(without)
    run "$name" limited "$PROFILE_SECONDS" "$PYTHON" benchmarks/profile_round.py --shape llama3.2-1b --device cuda \
        --backend cuda --json "$work/$name.json"
}

decode() {  # backend, batch, shape, transformers' ways to compare with …
    local backend=$1 batch=$2 shape=$3 model=(--shape "$3")
    shift 3
    [ "$shape" = demo ] && model=()
    run "decode-$backend-$batch-$shape${1:+-$1}$(without)" limited "$DECODE_SECONDS" "$PYTHON" benchmarks/decode_speed.py \
        "${model[@]}" --device cuda --backend "$backend" --batch "$batch" --peers "$@" --num_speculations 2 4 6 \
        --new_tokens 128 --rounds 3 --json "$work/decode.jsonl"
}

[[ " $steps " != *" build "* ]] || run build limited "$BUILD_SECONDS" "$PYTHON" setup.py build_ext --inplace
# Without this check a library that doesn't load would make its tests vanish, not fail.
"$PYTHON" - <<'PYTHON' 2>&1 | tee -a "$summary" || exit 1
import platform, sys
import torch, transformers, triton
import layerskip_kernels as lk

gpu = torch.cuda.get_device_properties(0)
print(gpu.name, f"sm_{gpu.major}{gpu.minor}", f"{gpu.total_memory >> 20} MiB", f"{gpu.multi_processor_count} SMs")
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__,
      "transformers", transformers.__version__)
print(lk.backends())
[reason] = [row.reason for row in lk.backends() if row.name == "cuda"]
if reason:
    sys.exit(f"gpu.sh: there are no CUDA kernels to run: {reason}")
PYTHON

for step in $steps; do
    case $step in
    check)
        check || { LAYERSKIP_PDL=0 check && export LAYERSKIP_PDL=0; } ||
            { LAYERSKIP_GRAPHS=0 check && export LAYERSKIP_GRAPHS=0; }
        ;;
    tests)
        tests cuda
        tests triton
        ;;
    decode)
        decode cuda 1 llama3.2-1b transformers
        decode cuda 1 llama3-8b transformers
        [ -n "$(without)" ] || LAYERSKIP_PDL=0 decode cuda 1 llama3.2-1b  # what it brings that launches overlap
        ;;
    benchmarks)
        for file in "${benchmark_files[@]}"; do
            bench "$(basename "$file" .py)" "$file" -k "not flex"
        done
        bench bench_flex_attention benchmarks/bench_verify_attention.py -k flex  # compiles for each of its shapes
        ;;
    profile)
        profile
        [ -n "$(without)" ] || LAYERSKIP_PDL=0 profile  # where a kernel's time has no waiting for the one in front in it
        ;;
    decode-more)
        for batch in 1 4 16 64; do
            for shape in demo llama3.2-1b llama3-8b; do
                [[ $batch = 1 && $shape != demo ]] || decode cuda $batch $shape transformers
                decode triton $batch $shape
            done
        done
        for shape in demo llama3.2-1b llama3-8b; do
            decode cuda 1 $shape compiled
        done
        ;;
    sanitizer)
        if ! command -v compute-sanitizer; then
            echo "sanitizer: no compute-sanitizer on PATH" | tee -a "$summary"
            continue
        fi
        # Views with canaries, ragged and masked windows, in each op: small, and all of a kernel's branches. Each tensor
        # has an allocation of its own, or what lies beyond it would be memory of torch's, and fine to touch.
        for tool in memcheck racecheck synccheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "sanitizer-$tool" limited "$SANITIZER_SECONDS" compute-sanitizer \
                --tool "$tool" --error-exitcode 9 --target-processes application-only --report-api-errors no \
                "$PYTHON" -m pytest -v --backend cuda -k "strided or views or masks" "${test_files[@]}"
        done
        ;;
    esac
done

[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}" | tee -a "$summary" >&2; exit 1; }
