"""Scores of an encoder and of what a model draws, directions fitted to labels, tables of them, and their files.

Import the names below from here, protocols from their module; imports engine, edit, models and what lies below.
"""

from encdiff.evaluation.codes import evaluate_codes
from encdiff.evaluation.directions import factor_direction, factor_labels, fit_direction
from encdiff.evaluation.edited import edit_effect
from encdiff.evaluation.effects import traversal_effects
from encdiff.evaluation.encode import encode_dataset, untrained
from encdiff.evaluation.ranking import rank_models
from encdiff.evaluation.results import read_scores, write_metrics
from encdiff.evaluation.scoring import evaluate, evaluate_model, stages
from encdiff.evaluation.swaps import counterfactual
from encdiff.evaluation.tables import format_swaps, format_table, plot_importance
from encdiff.models.directions import Direction, load_direction

__all__ = [
    "Direction", "counterfactual", "edit_effect", "encode_dataset", "evaluate", "evaluate_codes", "evaluate_model",
    "factor_direction", "factor_labels", "fit_direction", "format_swaps", "format_table", "load_direction",
    "plot_importance", "rank_models", "read_scores", "stages", "traversal_effects", "untrained", "write_metrics",
]  # fmt: skip
