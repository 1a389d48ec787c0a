"""Kernels from plain to fast, step by step, for the course page "From a plain kernel to a fast one".

No table uses them. The last step of each ladder is the kernel that the tables do use.
"""
