"""Triton kernels, installed as `encdiff.kernels`: one module or folder per op, importing torch and triton only."""

if __name__ != "encdiff.kernels":
    raise ImportError(
        f"imported as {__name__!r}, but this folder is the package encdiff.kernels: `pip install -e .`, then "
        "`import encdiff.kernels`. For PyPI's `kernels`, start Python outside encdiff's repository."
    )
