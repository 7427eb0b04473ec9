"""RDMA without an RDMA device: verbs in software, for Mooncake's own RDMA transport."""
