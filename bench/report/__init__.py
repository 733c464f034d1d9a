"""One run made readable: `page.write_report` writes index.html and report.md.

Nothing is imported here: `bench.compare` takes words and rows from this package, and needs neither Jinja nor torch.
"""
