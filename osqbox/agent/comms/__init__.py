"""Comms agents: the client side of the comms API, in the dialect of the design spike or of the C++ agent (g1).

`core.py`, `g1.py` and `spike.py` are threads as generators that yield what they want done (`effects.py`) and know no
socket; `driver.py` performs it on Trio.
"""
