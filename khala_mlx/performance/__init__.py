"""What the work costs: machine, memory, FLOPs, benchmarks."""
