"""Diffusion Shortcuts: five ways to make a diffusion model cheaper to sample, on one chain."""
