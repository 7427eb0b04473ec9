"""What the retry proxy costs: latency, and CPU per event of a stream."""
