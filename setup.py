"""The package map; everything else is in pyproject.toml.

The folder `kernels/` is installed as `encdiff.kernels`. As a top-level package it would stand in the way of PyPI's
`kernels`, which diffusers imports.
"""

from setuptools import setup

setup(
    packages=[
        "encdiff",
        "encdiff.data",
        "encdiff.diffusion",
        "encdiff.kernels",
        "encdiff.metrics",
        "encdiff.models",
        "encdiff.ops",
    ],
    package_dir={"encdiff.kernels": "kernels"},
)
