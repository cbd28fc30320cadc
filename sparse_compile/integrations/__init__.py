"""Bridges to libraries that train models; each needs its library, and is imported by itself."""
