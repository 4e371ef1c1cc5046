"""What tools/bench_data.py is made of."""
