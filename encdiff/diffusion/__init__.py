"""Diffusion in plain functions: noise schedules, samplers, losses. Import the modules by name; imports ops, files."""
