"""Stock servers on this CPU: their processes, the link between them, and their checkpoints."""
