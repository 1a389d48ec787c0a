"""Twins of the operations for CuPy arrays of float32.

A kernel is a .cu file, CUDA C++ compiled when it is first asked for, and the Python file that
launches it has its name. What the kernels cannot compute, the readable operations do.
"""
