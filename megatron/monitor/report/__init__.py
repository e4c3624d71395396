"""The report of one or several runs: one HTML file that needs nothing else.

``load`` and ``ledger`` read run folders in one bounded pass, ``summary`` and
``compare`` say in words and figures what happened, ``cost`` what mixing took for it,
``page`` writes the file.
"""

from megatron.monitor.report.page import words, write_report

__all__ = ["words", "write_report"]
