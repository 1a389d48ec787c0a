"""Build it yourself: the operations of a PVT as exercises, marked by the laws they must obey."""
