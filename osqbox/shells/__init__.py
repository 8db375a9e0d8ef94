"""Shells, server side: an agent that only dials out, joined to the operators who watch and type.

protocol.py messages.py ring.py session.py   the session as a state machine: frames and time in, frames out
tables.py service.py                         rows: sessions, digests of secrets, quotas
recording.py                                 what a shell printed, on disk
links.py broker.py routes.py                 WebSockets, the live sessions, the agents' paths
"""
