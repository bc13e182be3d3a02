"""Packages are the folders of the tree: those of revseg, and kernels, which is installed as revseg.kernels."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["revseg*"], exclude=["revseg.kernels*"]),
        *(f"revseg.{name}" for name in find_namespace_packages(include=["kernels*"])),
    ]
)
