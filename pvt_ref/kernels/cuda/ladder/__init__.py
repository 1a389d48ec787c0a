"""Kernels from plain to fast, a step at a time, for the course page on them (gpu_ladder.md).

No table uses them. The last step of each ladder is the kernel that the tables do use.
"""
