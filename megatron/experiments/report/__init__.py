"""The report of a study: one HTML file made from the files in its folder, which needs no other.

``files`` reads a study's folder, ``made`` keeps what its tables do not say, ``entries`` and
``curves`` put its runs in order, the others write a section each, ``page`` puts them together.
"""

from megatron.experiments.report.page import write_report

__all__ = ["write_report"]
