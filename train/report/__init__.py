"""The report of a run: one HTML file that opens anywhere, with no request to anywhere."""

from train.report.page import write_report
from train.report.samples import write_samples

__all__ = ["write_report", "write_samples"]
