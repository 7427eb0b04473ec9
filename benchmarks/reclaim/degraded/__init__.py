"""One of two prefills is in trouble: what stock and armed servers still answer."""
