"""Whole fields from a few sensors: a diffusion model that cross-attends to what was measured (arXiv 2409.00230)."""
