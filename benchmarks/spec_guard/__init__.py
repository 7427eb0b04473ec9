"""How often the anomaly guard is wrong, how often it misses, how long it takes, what it costs."""
