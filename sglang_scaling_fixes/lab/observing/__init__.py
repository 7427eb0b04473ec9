"""Digests of KV slots: written inside the decode server, read by the lab."""
