"""The optional CPU kernels; everything else is in pyproject.toml.

A plain shared object with a C interface: it needs no headers of Python or torch, and one
build works with every Python. Without a compiler the installation succeeds: a wheel without
the library, for any machine. `rac inspect` then says what is missing and what to install.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError
from setuptools.modified import newer_group

# The first line of a source that needs instructions of its own: "// build: x86_64 -mavx2",
# the processor and the flags.
BUILD_LINE = re.compile(r"// build: (\w+)(.*)")


class BuildPackage(build_py):
    """build_py that carries the clone's recipes/ as rac_modifier/recipes."""

    def run(self) -> None:
        """Copy the modules, then the recipes; an editable installation reads the clone's."""
        super().run()
        if not self.editable_mode:
            recipes = Path(self.build_lib) / "rac_modifier" / "recipes"
            self.mkpath(str(recipes))
            for path in Path("recipes").glob("*.yaml"):
                self.copy_file(str(path), str(recipes / path.name))


class BuildKernels(build_ext):
    """build_ext with the flags of each source's first line, and OpenMP if available."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources that this compiler builds for its processor, and link them."""
        path = self.get_ext_fullpath(ext.name)
        if not (self.force or newer_group([*ext.sources, *ext.depends, __file__], path, "newer")):
            return
        threads = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
        openmp = self._accepts(threads, ["-fopenmp"])
        if not openmp:
            self.warn("no OpenMP: the sparse kernel will run on one thread")
        flags = [*ext.extra_compile_args, *(["-fopenmp"] if openmp else [])]
        try:
            objects = []
            for source in ext.sources:
                isa_flags = self._flags_of(source)
                if isa_flags is not None:
                    objects += self.compiler.compile(
                        [source],
                        output_dir=self.build_temp,
                        include_dirs=ext.include_dirs,
                        extra_postargs=[*flags, *isa_flags],
                    )
            self.compiler.link_shared_object(
                objects, path, extra_postargs=flags, build_temp=self.build_temp, target_lang="c++"
            )
        except (CompileError, LinkError):
            self.warn(
                "the CPU kernels are left out: no C++ compiler works here. Serving will "
                "run sparse layers dense"
            )
            raise  # setuptools goes on, because the extension is optional

    def _flags_of(self, source: str) -> list[str] | None:
        """Return a source's flags; None: another processor, or flags unknown to the compiler."""
        line = BUILD_LINE.match(Path(source).read_text())
        if line is None or line[1] == "any":
            return []
        processor, flags = line[1], line[2].split()
        other = f"#if !defined(__{processor}__)\n#error another processor\n#endif\n"
        return flags if self._accepts(other, flags) else None

    def _accepts(self, code: str, flags: list[str]) -> bool:
        """Return whether the compiler makes a library of these lines; it prints nothing."""
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
            source.write_text(code)
            command = [
                *self.compiler.compiler_so,
                "-shared",
                *flags,
                str(source),
                "-o",
                str(library),
            ]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False


class BuildWheel(bdist_wheel):
    """bdist_wheel that names no platform where there is nothing compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag of a pure wheel if the library is missing."""
        if not list(Path(self.bdist_dir).rglob("_native_kernels*")):
            return ("py3", "none", "any")
        return super().get_tag()


setup(
    ext_modules=[
        Extension(
            "rac_modifier.kernels.cpu._native_kernels",
            sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            include_dirs=["csrc"],
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-falign-loops=32", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels, "bdist_wheel": BuildWheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
