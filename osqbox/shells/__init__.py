"""Shells, server side: an agent that only dials out, joined to the operators who watch and type.

protocol.py messages.py ring.py keyboard.py  pure: paths and words, output by its offset, input on its way
session.py                                   a session as a state machine: frames and time in, frames out
tables.py service.py                         rows: sessions, digests of secrets, quotas
recording.py journal.py                      on disk: what a shell printed, and whose input came how far
links.py broker.py routes.py                 WebSockets, the live sessions, the agents' paths
"""
