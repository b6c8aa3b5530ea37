"""scripts/arm_tools.sh with a package manager that only writes down what it was asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

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


@pytest.fixture
def machine(tmp_path):
    """A PATH with what the script uses, no compiler and no emulator. Runs it as the user of this
    number."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in USED.split():
        (bin / name).symlink_to(shutil.which(name))

    def command(name: str, text: str) -> None:
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)

    def run(user: int) -> subprocess.CompletedProcess[str]:
        command("id", f"#!/bin/sh\necho {user}\n")
        command("apt-get", APT.format(log=tmp_path / "asked"))
        command("dpkg", DPKG)
        return subprocess.run(
            [str(SCRIPT), str(tmp_path / "tools")],
            env={**os.environ, "PATH": str(bin)},
            capture_output=True,
            text=True,
        )

    return run


def asked(tmp_path: Path) -> list[str]:
    """The calls of apt-get."""
    return (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_root_installs_two_packages(machine, tmp_path):
    process = machine(0)
    assert process.returncode == 0, process.stderr
    update, install = asked(tmp_path)
    assert update.endswith(" update")
    assert install.endswith("install --yes --no-install-recommends g++-aarch64-linux-gnu qemu-user")
    assert not (tmp_path / "tools").exists()


def test_others_unpack_them_into_a_folder(machine, tmp_path):
    process = machine(1000)
    assert process.returncode == 0, process.stderr
    assert all(f"Dir::Cache={os.environ.get('TMPDIR', '/tmp')}" in call for call in asked(tmp_path))
    tools = tmp_path / "tools"
    programs = {path.name for path in (tools / "bin").iterdir()}
    assert programs == {COMPILER, "qemu-aarch64", "qemu-x86_64"}
    assert not (tools / "root" / "usr" / "bin" / "qemu-riscv64").exists()
    compiled = subprocess.run(
        [str(tools / "bin" / COMPILER), "-O2", "a b.cpp"],
        capture_output=True,
        text=True,
        check=True,
    )
    libraries, sysroot, *rest = compiled.stdout.split(" ", 2)
    assert libraries.startswith(f"{tools}/root/usr/lib/")
    assert (sysroot, rest) == (f"--sysroot={tools}/root", ["-O2 a b.cpp\n"])
    assert "the tools for ARM are there" in machine(1000).stdout
    assert len(asked(tmp_path)) == 2
