"""What a run says of itself while it runs: a log for programs and a display for people.

`MetricsLog` is the record, `Tracker` also sends its numbers to TensorBoard, W&B or trackio where
the settings name them, and `make_display` gives the display on stderr.
"""

from fulltune.tracking.display import (
    Display,
    LiveDisplay,
    PlainDisplay,
    make_display,
    stderr_console,
)
from fulltune.tracking.json_text import restore_numbers, to_json_text
from fulltune.tracking.log import MetricsLog, read_metrics
from fulltune.tracking.numbers import (
    format_bytes,
    format_duration,
    format_miss,
    format_number,
    name_of,
    printable,
    show_answer,
)
from fulltune.tracking.sinks import Tracker, TrackingConfig, check_sinks

__all__ = [
    "Display",
    "LiveDisplay",
    "MetricsLog",
    "PlainDisplay",
    "Tracker",
    "TrackingConfig",
    "check_sinks",
    "format_bytes",
    "format_duration",
    "format_miss",
    "format_number",
    "make_display",
    "name_of",
    "printable",
    "read_metrics",
    "restore_numbers",
    "show_answer",
    "stderr_console",
    "to_json_text",
]
