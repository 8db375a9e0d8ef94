"""The agent's end of remote shells: it asks for sessions, joins them, and gives each a terminal, real or scripted."""
