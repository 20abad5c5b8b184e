"""Pictures over plain rows, each written as PNG, SVG and CSV. The only place that imports matplotlib.

Every function takes the path without suffix, rows (dictionaries) and a caption, and returns the three paths it wrote.
"""

from chai_jax.report.figures.cells import heatmap
from chai_jax.report.figures.curves import cost_against, losses
from chai_jax.report.figures.diagram import pipeline_diagram
from chai_jax.report.figures.draw import DPI, TRADEOFF, Measure
from chai_jax.report.figures.layers import by_layer, head_maps, pair_maps, sensitivity, spectrum
from chai_jax.report.figures.tradeoff import pareto, radar, scatter3d, unbeaten

__all__ = [
    "DPI",
    "TRADEOFF",
    "Measure",
    "by_layer",
    "cost_against",
    "head_maps",
    "heatmap",
    "losses",
    "pair_maps",
    "pareto",
    "pipeline_diagram",
    "radar",
    "scatter3d",
    "sensitivity",
    "spectrum",
    "unbeaten",
]
