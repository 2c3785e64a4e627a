"""Kernels of our own for GPUs, each next to the plain formula that it stands for."""
