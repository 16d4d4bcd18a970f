#!/bin/sh
# Installs Fathom, PyTorch with CUDA and Transformer Engine into /opt/fathom, inside of an image that is being built.
# Run in a copy of the checkout. The versions are those of constraints.txt, which the tests run with.
set -eu

# Of `te` in pyproject.toml, the release that .github/workflows/gpu.yml compiles.
TRANSFORMER_ENGINE=2.11.0

export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
apt-get update
apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ ninja-build git
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/fathom
PATH=/opt/fathom/bin:$PATH
pip install --upgrade --constraint constraints.txt pip setuptools wheel
DS_BUILD_OPS=0 pip install --constraint constraints.txt --build-constraint constraints.txt .

# Its parts for PyTorch are compiled against the PyTorch that was just installed.
pip install ninja pybind11 einops onnx onnxscript
NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS:-8}" pip install --no-build-isolation --no-deps \
    "transformer-engine==$TRANSFORMER_ENGINE" \
    "transformer-engine-cu13==$TRANSFORMER_ENGINE" \
    "transformer-engine-torch==$TRANSFORMER_ENGINE"

fathom --version
