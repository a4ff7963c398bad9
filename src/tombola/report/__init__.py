"""One self-contained page about a set of results, and its score table in Markdown and LaTeX."""

from tombola.report.build import build_page, latex_table, markdown_table, render

__all__ = ["build_page", "latex_table", "markdown_table", "render"]
