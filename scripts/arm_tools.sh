#!/bin/sh
# Install what the tests of the ARM kernels and of lesser processors need: a cross compiler and qemu (Debian and Ubuntu).
#
#     scripts/arm_tools.sh [folder]          default build/arm-tools, where the tests look
#
# It unpacks two packages, and what they depend on, into the folder (300 MB): no root needed, nothing is installed.
set -eu
folder=$(cd "$(dirname "$0")/.." && pwd)/build/arm-tools
folder=${1:-$folder}
compiler=aarch64-linux-gnu-g++
packages="g++-aarch64-linux-gnu qemu-user"

missing=
for tool in $compiler qemu-aarch64 qemu-x86_64; do command -v $tool >/dev/null || missing="$missing $tool"; done
if [ -z "$missing" ] || [ -x "$folder/bin/$compiler" ]; then
    echo "the tools for ARM are there"
    exit
fi
if ! command -v apt-get >/dev/null; then
    echo "no apt-get on this machine: install a $compiler and qemu-user (10.0 or newer) with its own package manager" >&2
    exit 1
fi

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$folder/bin"
apt() { apt-get -qq -o Dir::State::lists="$work/lists" -o Dir::Cache="$work" -o Debug::NoLocking=1 -o Acquire::Retries=3 "$@"; }
apt update
apt install --yes --no-install-recommends --download-only $packages
for package in "$work"/archives/*.deb; do dpkg -x "$package" "$folder/root"; done
find "$folder/root/usr/bin" -name 'qemu-*' ! -name qemu-aarch64 ! -name qemu-x86_64 -delete

cat >"$folder/bin/$compiler.new" <<WRAPPER
#!/bin/sh
export LD_LIBRARY_PATH="$folder/root/usr/lib/$(uname -m)-linux-gnu"
exec "$folder/root/usr/bin/$compiler" --sysroot="$folder/root" "\$@"
WRAPPER
for emulator in qemu-aarch64 qemu-x86_64; do ln -sf "$folder/root/usr/bin/$emulator" "$folder/bin/$emulator"; done
chmod +x "$folder/bin/$compiler.new"
mv "$folder/bin/$compiler.new" "$folder/bin/$compiler"
