"""QRPO: Quantile Reward Policy Optimization, as a library that has never heard of Prefect."""

__version__ = "0.1.0"
