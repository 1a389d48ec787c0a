"""Twins of the operations for CuPy arrays of float32.

A kernel is a .cu file, CUDA C++ that is compiled at the first use. The Python file that launches it
has the same name. The readable operations do what the kernels cannot.
"""
