"""scripts/arm_tools.sh with a package manager that only writes down what it was asked for."""

import os
import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "arm_tools.sh"
USED = "sh dirname mktemp mkdir rm ln chmod mv cat uname find touch"
COMPILER = "aarch64-linux-gnu-g++"
APT = """#!/bin/sh
echo "$@" >>"{log}"
case "$*" in *download-only*)
  cache=${{*#*Dir::Cache=}}; touch "${{cache%% *}}/archives/gcc.deb" ;;
esac
"""
DPKG = f"""#!/bin/sh
mkdir -p "$3/usr/bin"
printf '#!/bin/sh\\necho "$LD_LIBRARY_PATH" "$@"\\n' >"$3/usr/bin/{COMPILER}"
chmod +x "$3/usr/bin/{COMPILER}"
touch "$3/usr/bin/qemu-aarch64" "$3/usr/bin/qemu-x86_64" "$3/usr/bin/qemu-riscv64"
"""


def test_a_user_without_root_unpacks_them_into_a_folder(tmp_path):
    bin, tools = tmp_path / "bin", tmp_path / "tools"
    bin.mkdir()
    for name in USED.split():
        (bin / name).symlink_to(shutil.which(name))
    for name, text in {"dpkg": DPKG, "apt-get": APT.format(log=tmp_path / "asked")}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    environment = {**os.environ, "PATH": str(bin)}

    def output(*command) -> str:
        words = [str(word) for word in command]
        return subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True).stdout

    output(SCRIPT, tools)
    programs = {path.name for path in (tools / "bin").iterdir()}
    assert programs == {COMPILER, "qemu-aarch64", "qemu-x86_64"}
    assert not (tools / "root" / "usr" / "bin" / "qemu-riscv64").exists()
    libraries, sysroot, *rest = output(tools / "bin" / COMPILER, "-O2", "a b.cpp").split(" ", 2)
    assert libraries.startswith(f"{tools}/root/usr/lib/")
    assert (sysroot, rest) == (f"--sysroot={tools}/root", ["-O2 a b.cpp\n"])
    assert "the tools for ARM are there" in output(SCRIPT, tools)
    assert len((tmp_path / "asked").read_text().splitlines()) == 2
