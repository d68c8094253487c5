#!/bin/sh
# Puts nvcc and what it needs to compile and link into FOLDER/nvidia/cu13, from the package index: toolkit.sh PYTHON FOLDER
set -eu
"$1" -m pip install --quiet --no-deps --target "$2" \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
ln -sfn lib "$2/nvidia/cu13/lib64"  # nvcc links what is there
