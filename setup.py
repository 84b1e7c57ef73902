"""Builds the compiled part of megatron-meco; everything else is in pyproject.toml.

The extension is required, never optional: a wheel without it would only fail later and further
from the cause. No `-march=native`, because wheels travel between machines; the code is bound by
memory, so that gives up little.
"""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCES = sorted(path.as_posix() for path in Path("csrc").glob("*.cpp"))
# Listed as dependencies, so that a changed header rebuilds and a source distribution carries it.
HEADERS = sorted(path.as_posix() for path in Path("csrc").glob("*.h"))

ParallelCompile("MECO_BUILD_JOBS").install()

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_meco._core",
            SOURCES,
            include_dirs=["csrc"],
            depends=HEADERS,
            cxx_std=17,
            extra_compile_args=["-O3", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
