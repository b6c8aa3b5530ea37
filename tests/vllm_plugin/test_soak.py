"""A short soak of `vllm serve` on packed layers: clients leave, nothing fails, and the memory of its processes stays flat.

`python -m bench serving --soak FOLDER` is the long one: 5,000 requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm_plugin.vllm_fixtures import needs_vllm, save_model

needs_vllm()

from rac_modifier.kernels.cpu.support import support  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(support().isa is None, reason=support().reason)
def test_memory_is_flat_while_clients_come_and_leave(tmp_path):
    folder = save_model(tmp_path / "model", "qwen3", "unstructured", max_position_embeddings=512)
    command = [sys.executable, "-m", "bench", "serving", "--soak", str(folder)]
    command += ["--requests", "600", "--settle", "300", "--leave", "0.3"]
    command += ["--work", str(tmp_path), "--out", str(tmp_path)]
    command += ["--serve-options", "--skip-tokenizer-init --num-gpu-blocks-override 64"]
    # a server has its own
    of_this_process = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND")
    environment = {name: value for name, value in os.environ.items() if name not in of_this_process}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "of 7 compressed layers run on a kernel" in (tmp_path / "soak.log").read_text()
    ((requests, left, failed, *_),) = json.loads((tmp_path / "serving_soak.json").read_text())[
        "rows"
    ]
    assert (requests, failed) == (600, 0)
    assert left > 100
