"""What runs show: evaluation, statistics, the report, the demo, readings of a store."""
