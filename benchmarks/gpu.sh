#!/usr/bin/env bash
# Everything that a GPU decides, measured on one GPU in at most 8 minutes; a table at the end, a file for each
# part in benchmarks/results/gpu. docs/how-to/gpu-benchmark.md says how to bring it to a machine without a
# package registry.
#
#   benchmarks/gpu.sh                       # on a GPU
#   benchmarks/gpu.sh --tiny                # anywhere: tiny shapes show that it runs
#   benchmarks/gpu.sh --parts vllm --minutes 5 --output FOLDER
#
# PYTHON      interpreter with torch, transformers and the other packages; our package need not be installed.
# TRL_PYTHON  interpreter with trl; PYTHON by default.
# WHEELS      folder of wheels to install into PYTHON first, without a registry.
# QRPO_COMMIT the commit of this checkout, if git is not there to tell it.
#
# The exit status is 0 if every part ran, whatever it measured, else 1.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}
export TRL_PYTHON=${TRL_PYTHON:-$PYTHON}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Without flashinfer vLLM would import it for sampling, and fail.
export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}
if [ -n "${WHEELS:-}" ]; then
	"$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
exec "$PYTHON" benchmarks/gpu_table.py "$@"
