"""Packages: `megatron_p2o` and, from its folder under kernels/, `p2o_kernels`."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["megatron_p2o", "megatron_p2o.*"])
    + find_packages("kernels", include=["p2o_kernels", "p2o_kernels.*"]),
    package_dir={"p2o_kernels": "kernels/p2o_kernels"},
)
