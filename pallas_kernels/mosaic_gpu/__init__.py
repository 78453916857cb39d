"""A small vocabulary for Mosaic GPU kernels that are written thread by thread.

Pallas has no operations on the fragments that tensor cores take from registers. Kernels that
unpack bits straight into those fragments are therefore one `inline_mgpu` body in terms of
`registers` (one scalar per thread), `ptx` (instructions) and `launch` (grids and memory).
"""
