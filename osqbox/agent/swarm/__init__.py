"""Thousands of agents in one process: the same core as one agent's, driven from one heap."""
