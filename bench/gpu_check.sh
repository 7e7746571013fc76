#!/usr/bin/env bash
# What a machine with a GPU says of a checkout, in three stages of less than ten minutes each:
#   test      builds for the GPU at hand and runs every test marked gpu, those of tests/ops on cuda among them
#   bench     times the ops beside torch, torch.compile, Triton and, where it is installed, FlashInfer
#   sanitize  runs some small tests under compute-sanitizer
#
#   bench/gpu_check.sh [stage ...]      default: all three, in this order
#
# Results go to $OUT, or else to bench/results. Exit code: 0, or the number of the stage that failed (1, 2, 3); 4 without
# a GPU; 64 for another stage; 65 without torch. Needs nvcc, g++ >= 12, CMake, and python (or $PYTHON) with torch for
# CUDA, pybind11 and what the tests need; nothing is installed or downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
out=${OUT:-bench/results}
build=build/gpu
limit=590  # seconds of a stage

say() { echo "gpu_check: $*" >&2; }

# Small tests, because a kernel runs ten to a hundred times slower under the sanitizer.
small_tests=(
  tests/ops/test_commit.py
  tests/ops/test_verify_chain_greedy.py
  tests/ops/test_linear.py::test_rows_may_be_views
  tests/ops/test_penalize.py::test_each_argument_alone
  tests/ops/test_apply_token_bitmask.py::test_views_and_nothing_outside
  tests/ops/test_row_stats.py::test_views
  tests/ops/test_sample.py::test_views
  tests/ops/test_topk_logits.py::test_shapes_views_and_inactive
  tests/ops/test_target_probs.py::test_views_and_scalars
  tests/ops/test_token_logprobs.py::test_views
  tests/ops/test_verify_chain.py::test_views
  tests/ops/test_paged_attention.py::test_every_scheme_equals_reference_in_every_dtype
  tests/ops/test_paged_attention.py::test_strided_queries_and_tables
  tests/ops/test_paged_attention.py::test_a_broken_key_or_value_spoils_only_rows_that_see_it
  tests/ops/test_paged_attention.py::test_each_query_has_its_own_boundary
  tests/ops/test_prefix_attention.py::test_strided_queries
  tests/ops/test_merge_states.py::test_large_logits_do_not_overflow
)
tools=(memcheck racecheck synccheck initcheck)

libraries() {  # builds, and lays the libraries beside the package's Python files
  local pybind11
  pybind11=$("$PYTHON" -m pybind11 --cmakedir) || return
  cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DFASTDECODE_CUDA=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -Dpybind11_DIR="$pybind11" &&
    timeout "$(left)" cmake --build "$build" --parallel &&
    cp "$build"/*.so python/fastdecode/
}

left() { echo $((limit - SECONDS)); }
run() { timeout --signal=INT "$(left)" env PYTHONPATH=python "$@"; }

stage_test() {
  libraries > "$out/gpu_build.log" 2>&1 || {
    tail -20 "$out/gpu_build.log"
    say "the build failed; $out/gpu_build.log has all of it"
    return 1
  }
  run "$PYTHON" -m pytest -q --require-backend cuda -m gpu tests 2>&1 | tee "$out/gpu_test.log"
}

stage_bench() { run "$PYTHON" -m bench.gpu --json "$out" 2>&1 | tee "$out/gpu_bench.log"; }

stage_sanitize() {
  local tool failed=0
  if ! command -v compute-sanitizer > /dev/null; then
    say "compute-sanitizer: not available" 2>&1 | tee "$out/gpu_sanitize.log"
    return 0
  fi
  : > "$out/gpu_sanitize.log"
  for tool in "${tools[@]}"; do
    # without torch's cache of memory, so that what is read past the end of a tensor is past the end of an allocation
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run timeout $((limit / ${#tools[@]})) compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
      "$PYTHON" -m pytest -q -x --require-backend cuda -m gpu "${small_tests[@]}" >> "$out/gpu_sanitize.log" 2>&1
    case $? in
      0) say "$tool: no errors" ;;
      *) failed=1 && say "$tool: failed; $out/gpu_sanitize.log has all of it" ;;
    esac
  done
  tail -20 "$out/gpu_sanitize.log"
  return "$failed"
}

[ $# -gt 0 ] || set -- test bench sanitize
for stage in "$@"; do
  case $stage in
    test | bench | sanitize) ;;
    *) say "stage: expected test, bench or sanitize, got $stage" && exit 64 ;;
  esac
done
"$PYTHON" -c "import torch" || {
  say "$PYTHON cannot import torch"
  exit 65
}
"$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
  say "there is no GPU that torch can use"
  exit 4
}
mkdir -p "$out"
for stage in "$@"; do
  say "$stage"
  SECONDS=0
  "stage_$stage" || {
    say "$stage: failed"
    case $stage in test) exit 1 ;; bench) exit 2 ;; sanitize) exit 3 ;; esac
  }
done
