"""Whole experiments, from data to figures: the demonstration, the paper's tables, its ablations.

They are made of phases (train once, score once), each continued where it was interrupted and never repeated. Import
the modules by name; they may import every room but the command line.
"""
