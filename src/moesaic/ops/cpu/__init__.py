"""Experts and linear maps on the CPU, in native code that is compiled once for this machine."""
