"""The parts of tools/bench_loss.py. The parent process (`runner`) imports no torch; what is measured runs in `child`."""
