"""The package map and the native noise engine; everything else is in pyproject.toml.

The folder `kernels/` is installed as `encdiff.kernels`. As a top-level package it would stand in the way of PyPI's
`kernels`, which diffusers imports. The sources in `csrc/` go along, for the build at first use.
"""

import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
native = runpy.run_path(str(HERE / "encdiff/ops/_build.py"), run_name="encdiff.ops._build")


class BuildNative(build_ext):
    """Hands the extension to `encdiff.ops._build`; where that cannot build it, the install goes on without.

    `build/native` is kept, unlike setuptools' folder in an editable install: a change compiles what it touches.
    """

    def build_extension(self, ext: Extension) -> None:
        try:
            native["build"](Path(self.get_ext_fullpath(ext.name)), HERE / "build" / "native")
        except (native["BuildError"], OSError) as error:
            without_native(error)


def without_native(why: Exception) -> None:
    if native["wanted_cuda"]() == "1":
        raise SystemExit(f"encdiff: {why}")
    if {"egg_info", "dist_info"}.isdisjoint(sys.argv):  # a build runs this file several times
        says = f"no native noise engine in this install ({why}); first use builds it if it can"
        print(f"encdiff: {says}", file=sys.stderr)


def extensions() -> list[Extension]:
    """None without torch (an isolated build: built at first use) or without a compiler (the reference serves)."""
    try:
        native["find_torch"](), native["find_compiler"](), native["find_nvcc"]()
    except native["BuildError"] as error:
        without_native(error)
        return []
    return [Extension("encdiff._C", [], py_limited_api=True, optional=True)]


setup(
    packages=[
        "encdiff",
        "encdiff.baselines",
        "encdiff.cli",
        "encdiff.csrc",
        "encdiff.data",
        "encdiff.diffusion",
        "encdiff.distributed",
        "encdiff.edit",
        "encdiff.engine",
        "encdiff.evaluation",
        "encdiff.experiments",
        "encdiff.fields",
        "encdiff.files",
        "encdiff.health",
        "encdiff.interop",
        "encdiff.kernels",
        "encdiff.kernels.cross_attention",
        "encdiff.metrics",
        "encdiff.models",
        "encdiff.objectives",
        "encdiff.ops",
        "encdiff.pictures",
        "encdiff.pretrained",
        "encdiff.pretrained.darcy64",
        "encdiff.pretrained.darcy64.run",
        "encdiff.pretrained.quickstart",
        "encdiff.pretrained.quickstart.run",
        "encdiff.pretrained.room32",
        "encdiff.pretrained.room32.run",
        "encdiff.pretrained.room64",
        "encdiff.pretrained.room64.run",
        "encdiff.prior",
        "encdiff.training",
    ],
    package_dir={"encdiff.kernels": "kernels", "encdiff.csrc": "csrc"},
    package_data={
        "encdiff": ["py.typed"],
        "encdiff.csrc": ["*.cpp", "*.cu", "*.h"],
        "encdiff.pretrained.darcy64": ["*"],
        "encdiff.pretrained.darcy64.run": ["*"],
        "encdiff.pretrained.quickstart": ["*"],
        "encdiff.pretrained.quickstart.run": ["*"],
        "encdiff.pretrained.room32": ["*"],
        "encdiff.pretrained.room32.run": ["*"],
        "encdiff.pretrained.room64": ["*"],
        "encdiff.pretrained.room64.run": ["*"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
