"""The pipelines of diffusers without transformers, whose text encoder none of these tests needs.

Both packages are found in the checkout's own folder `kernels/`, which transformers takes for PyPI's: it could not be
imported here if it were installed. `pipelines()` therefore imports them with an empty stand-in for it.
"""
