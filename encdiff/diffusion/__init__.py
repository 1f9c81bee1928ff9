"""Diffusion in plain functions: noise schedules, samplers, losses. Import the modules by name.

Imports ops and what lies below.
"""
