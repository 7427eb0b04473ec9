"""LayerSplit on the classes of one stock release, in a process of its own: see `run`."""
