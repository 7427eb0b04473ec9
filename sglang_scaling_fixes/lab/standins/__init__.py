"""What a CPU lacks to run a stock SGLang, supplied inside the server's processes by `lab.boot`."""
