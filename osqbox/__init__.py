"""osqbox: everything around an endpoint agent, in one process you can start in a second."""

__version__ = "0.1.0"
