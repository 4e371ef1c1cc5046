"""Machine code of the Triton kernels, compiled ahead of time for chips that are not here."""
