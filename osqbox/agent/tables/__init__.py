"""The tables this machine can fill truthfully, one file per part of the machine. Linux."""
