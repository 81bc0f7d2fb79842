"""Triton kernels: one file per semantic op, with kernels, launchers, and why their constants are what they are.

These modules import triton and are themselves imported at the first call that needs them (`registry.register_triton`):
moefx works without triton. A launcher takes and returns what its dialect op does, allocates its outputs, never waits
for the device, and writes every element of every output. How they are checked without a GPU: `sass` compiles them for
the machines they are meant for, and the Triton interpreter runs them on a CPU (tests/kernels).
"""
