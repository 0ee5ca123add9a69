"""Finds the packages of libs; pyproject.toml cannot, for a folder that is installed under another name."""

from setuptools import find_packages, setup

setup(packages=["diffusion_shortcuts", *(f"diffusion_shortcuts.{name}" for name in find_packages("libs"))])
