#!/usr/bin/env bash
# What needs a GPU: builds tests/gpu and the benchmarks, and runs them. No network.
#   scripts/gpu_check.sh          both, on one machine with PyTorch 2.11 for CUDA 13 and nvcc 13
#   scripts/gpu_check.sh build    builds into build/gpu_check, programs with the libraries they need
#   scripts/gpu_check.sh run      runs what is there, on another machine: the folder is all that it needs of this one,
#                                 besides PyTorch (python3) and the driver
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-both}
out=build/gpu_check
programs=(gpu_test gpu_training_test gpu_lora_test comm_bench engine_bench)

build() {
  cmake -G Ninja -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release -DFSDP_WITH_CUDA=ON -Wno-dev
  cmake --build build/gpu --target fsdp_cuda "${programs[@]}"
  rm -rf "$out"
  mkdir -p "$out/bin" "$out/lib"
  cp "${programs[@]/#/build/gpu/bin/}" "$out/bin/"
  cp build/gpu/lib/libfsdp_cuda.so "$out/lib/"
  # Not the C library's, nor PyTorch's: those are there.
  ldd "${programs[@]/#/$out/bin/}" | awk '$3 ~ /yaml|pcre|utf8proc|simdjson/ {print $3}' | sort -u |
    xargs -r cp -L -t "$out/lib/"
}

run() {
  local torch site
  torch=$("${PYTHON:-python3}" -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))')
  site=$(dirname "$torch")
  export LD_LIBRARY_PATH="$PWD/$out/lib:$torch/lib:$site/nvidia/nccl/lib:$site/nvidia/cu13/lib:${LD_LIBRARY_PATH:-}"
  export FSDP_CUDA_LIBRARY="$PWD/$out/lib/libfsdp_cuda.so"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  local status=0
  "$out/bin/gpu_test" || status=$?
  "$out/bin/gpu_training_test" || status=$?
  "$out/bin/gpu_lora_test" || status=$?
  "$out/bin/comm_bench" || status=$?
  "$out/bin/engine_bench" 3 || status=$?
  return "$status"
}

case "$what" in
  build) build ;;
  run) run ;;
  both) build && run ;;
  *) sed -n '2,7p' "$0"; exit 2 ;;
esac
