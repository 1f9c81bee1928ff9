"""Our kernels and samplers in other libraries' models, and theirs in ours."""
