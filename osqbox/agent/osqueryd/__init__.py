"""A stand-in for the osqueryd program: its command line, its shell, its daemon and the files it leaves.

osquery/{core/{init,flags,shutdown},main/main,devtools/{shell,printer},utils/pidfile} of osquery 5.23.
"""
