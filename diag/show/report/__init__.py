"""Runs as one self-contained HTML page: words, curves, tables, heads, pictures, provenance. No torch.

    write_report([Path("runs/demo-vision")], Path("report.html"))

The page holds all it needs: no file beside it, no request to anywhere. The same folders give the same bytes.
"""

from diag.show.report.render import default_title, page
from diag.show.report.write import Report, write_report

__all__ = ["Report", "default_title", "page", "write_report"]
