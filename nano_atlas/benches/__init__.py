"""Evaluation: arms and controls, scores and tables, τ²-bench, CRMArena-Pro."""
