"""Sparse attention measured beside dense attention and beside other sparse kernels.

harness times calls, workloads says what is computed, case compiles its mask, backends are who
computes it, measure puts these together into rows, and table and figure show rows.
"""
