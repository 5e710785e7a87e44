"""From numbers per input to tables with intervals, and how they are kept and read."""
