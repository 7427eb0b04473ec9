"""The two releases whose servers and processes the tests start."""

OLD, NEW = "0.5.12", "0.5.23"
