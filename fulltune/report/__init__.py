"""The report of a run, or of several side by side, and the card of its model."""

from fulltune.report.model_card import render_model_card
from fulltune.report.report import write_report

__all__ = ["render_model_card", "write_report"]
