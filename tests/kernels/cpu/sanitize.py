"""`make sanitize`: random and hostile calls of all kernels under AddressSanitizer and UBSan.

AVX512 and AMX are emulated, so that the sanitizers see their memory accesses.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernels.cpu.kernel_helpers import compile_sources

FLAGS = ["-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        program = compile_sources(Path(folder, "drive"), *FLAGS, drive=True)
        # libgomp's thread pool is never freed.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        sys.exit(subprocess.run([str(program), "100"], env=environment).returncode)
