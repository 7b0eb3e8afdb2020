"""What a run tells people: records on disk and to TensorBoard, the progress display, figures and the HTML report.

The trainer writes records (`metrics.MetricsWriter`, `progress.Progress`); everything else here reads a run folder and needs
nothing but its files. `report` and `figures` import matplotlib: import them where a report is built, not where a run starts.
"""

from mftcoder_coba.reporting.metrics import MetricsWriter
from mftcoder_coba.reporting.progress import Progress, print_final_table
from mftcoder_coba.reporting.records import Metrics, Run, Series, read_metrics, read_run

__all__ = ["Metrics", "MetricsWriter", "Progress", "Run", "Series", "print_final_table", "read_metrics", "read_run"]
