"""The optional CPU kernels; everything else is in pyproject.toml.

A plain shared object with a C interface: it needs no headers of Python or torch, and one build works with every Python.
Without a compiler the installation succeeds: a wheel without the library, for any machine. `rac inspect` then says what is
missing and what to install.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError


class BuildKernel(build_ext):
    """build_ext that adds OpenMP if the compiler has it."""

    def build_extension(self, ext: Extension) -> None:
        """Build with the flags that this compiler accepts."""
        if self._compiles("-fopenmp"):
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        else:
            self.warn("no OpenMP: the sparse kernel will run on one thread")
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            self.warn(
                "the CPU kernels are left out: no C++ compiler works here. Serving will run sparse layers dense"
            )
            raise  # setuptools goes on, because the extension is optional

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No symbols: it is not a Python module."""
        return []

    def _compiles(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(
                "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n"
            )
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=[flag]
                )
                self.compiler.link_executable(
                    objects, "probe", output_dir=folder, extra_postargs=[flag]
                )
            except (CompileError, LinkError):
                return False
        return True


class BuildWheel(bdist_wheel):
    """bdist_wheel that names no platform where there is nothing compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag of a pure wheel if the library is missing."""
        if not list(Path(self.bdist_dir).rglob("_native*")):
            return ("py3", "none", "any")
        return super().get_tag()


setup(
    ext_modules=[
        Extension(
            "rac_modifier.kernels.cpu._native",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": BuildWheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
