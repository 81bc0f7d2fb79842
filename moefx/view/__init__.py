"""Looking at graphs and reports."""

from .text import diff, render

__all__ = ["diff", "render"]
