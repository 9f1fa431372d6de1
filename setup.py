# SPDX-License-Identifier: Apache-2.0
"""The one thing that setup.cfg cannot say: the packages found under kptrace/, and bpf/ as kptrace.bpf."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["kptrace", "kptrace.*"]), "kptrace.bpf"])
