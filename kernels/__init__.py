"""Kernels: one file per semantic op, each with the providers that can compute it (see `registry`)."""
