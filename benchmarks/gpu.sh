#!/usr/bin/env bash
# Tests and speed on a CUDA machine without a network; it has Python 3.12 with PyTorch 2.11 and pip, nothing else.
#
#   benchmarks/gpu.sh wheels WHEELS                  in a development environment with a network: everything but PyTorch
#   benchmarks/gpu.sh tests WHEELS [--device cpu]    the tests that need a GPU; planned memory against what is allocated
#   benchmarks/gpu.sh bench WHEELS [--device cpu]    the speed suite at 5m and 48m, float32 and bfloat16
#
# Each part takes less than nine minutes and writes gpu_PART_DATE.txt, and what it measured as JSON beside it, into $OUT,
# or where that is not set into benchmarks/results. The exit status is 0 if every step succeeded in its time; the others
# are made anyway. `--device cpu` takes the same path on a CPU, at the smallest size.
# PYTHON names the interpreter, by default python3; for `wheels`, PYTHON_VERSION (3.12) and PLATFORM that of the machine.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
PLATFORM=${PLATFORM:-manylinux_2_28_x86_64}
OUT=${OUT:-$root/benchmarks/results}
# gymnasium, MuJoCo and, for gymnasium's environments of it, imageio for the runs; `launch` for the command line; pytest
# and what conftest.py imports for the tests.
needed=("pwm-torchrl[gym,mujoco,launch]" imageio pytest pytest-timeout hypothesis)

usage() { sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

# What this environment has of all that is needed, but PyTorch and the CUDA libraries that it brings.
make_wheels() {
    local wanted=(--only-binary=:all: --python-version "$PYTHON_VERSION" --platform "$PLATFORM")
    wanted+=(--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
    mkdir -p "$1" || exit 1
    local package versions
    versions=$(cd "$root" && "$PYTHON" - "$PYTHON_VERSION" "${needed[@]}" <<'EOF'
import re, sys
from importlib.metadata import requires, version
from packaging.requirements import Requirement

left_out = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
todo, seen = [Requirement(word) for word in sys.argv[2:]], {}
while todo:
    requirement = todo.pop()
    name = re.sub("[-_.]+", "-", requirement.name).lower()
    extras = {"", *requirement.extras}
    if left_out.fullmatch(name) or extras <= seen.get(name, set()):
        continue
    seen[name] = seen.get(name, set()) | extras
    for each in map(Requirement, requires(name) or []):
        target = [{"python_version": sys.argv[1], "python_full_version": sys.argv[1] + ".0", "extra": x} for x in extras]
        if each.marker is None or any(map(each.marker.evaluate, target)):
            todo.append(each)
seen.pop("pwm-torchrl")
print(*(f"{name}=={version(name)}" for name in sorted(seen)))
EOF
    ) || exit 1
    for package in $versions; do
        "$PYTHON" -m pip download --quiet --no-deps "${wanted[@]}" --dest "$1" "$package" 2> /dev/null ||
            "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$1" "$package" || exit 1  # there is only its source
    done
    du -sh "$1"
}

# Runs one step with a time limit in seconds, its output and outcome in the result file.
step() {
    local name=$1 limit=$2 begun=$SECONDS status
    shift 2
    printf '\n== %s\n$ %s\n' "$name" "$*" | tee -a "$result"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$result"
    status=${PIPESTATUS[0]}
    printf -- '-- %s: exit status %s after %s s of %s\n' "$name" "$status" "$((SECONDS - begun))" "$limit" | tee -a "$result"
    [ "$status" -eq 0 ] || failed+=("$name")
}

run_tests() {
    cd "$root" || exit 1
    # By file: collecting all others would need every optional library.
    mapfile -t files < <(grep -rl 'pytest.mark.gpu' tests)
    step "tests that need a GPU" 270 "$PYTHON" -m pytest -q -m gpu "${files[@]}"
    local rows=(--skip-large)
    [ "$device" = cpu ] && rows=(--quick)
    step "memory, planned and allocated" 240 "$PYTHON" benchmarks/memory_accuracy.py --device "$device" "${rows[@]}" \
        --json "$OUT/gpu_memory_$date.json"
}

run_bench() {
    cd "$root" || exit 1
    local precision
    for precision in fp32 bf16; do
        if [ "$device" = cpu ]; then
            speed mlp tiny "$precision" 60 --seconds 0.2
            continue
        fi
        speed mlp 48m "$precision" 60 --seconds 1
        speed flow_v2 48m "$precision" 90 --seconds 1
        speed few_step 48m "$precision" 60 --seconds 1
        speed flow_v2 5m "$precision" 40 --seconds 1
    done
}

# model, size, precision, time limit, further options
speed() {
    step "speed of $1 at $2, $3" "$4" "$PYTHON" benchmarks/speed.py --device "$device" --models "$1" --sizes "$2" \
        --precision "$3" "${@:5}" --json "$OUT/gpu_speed_$1_$2_$3_$date.json"
}

part=${1:-} wheels=${2:-} device=cuda
[ -n "$wheels" ] || usage
[ "$#" -eq 2 ] || { [ "$#" -eq 4 ] && [ "$3" = --device ] && device=$4; } || usage
case $part in
    wheels) make_wheels "$wheels"; exit ;;
    tests | bench) ;;
    *) usage ;;
esac

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
date=$(date +%F)
result=$OUT/gpu_${part}_$date.txt
failed=()
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
export PYTHONPATH="$site:$root" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=agg

{
    echo "benchmarks/gpu.sh $part on $device, $date, commit $(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)"
    "$PYTHON" - "$device" <<'EOF'
import os, platform, sys, torch
if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit(f"PyTorch {torch.__version__} sees no CUDA device")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
print(f"GPU: {gpu}; CUDA {torch.version.cuda}; PyTorch {torch.__version__}; Python {platform.python_version()}; "
      f"{len(os.sched_getaffinity(0))} CPUs; load {os.getloadavg()[0]:.1f}")
EOF
} 2>&1 | tee "$result"
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 1
if [ "$part" = tests ]; then run_tests; else run_bench; fi
if [ "${#failed[@]}" -gt 0 ]; then
    printf '\nnot as it should be: %s\n' "$(IFS=';'; echo "${failed[*]}")" | tee -a "$result"
    exit 1
fi
printf '\nevery step succeeded\n' | tee -a "$result"
