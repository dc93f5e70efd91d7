"""Does the video stay the same? Metrics, comparison, report and speed benchmarks."""
