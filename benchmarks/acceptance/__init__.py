"""What corrupted KV does to speculative decoding, on real servers of the tiny GLM-5.1."""
