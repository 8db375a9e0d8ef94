"""The agent comms API: authenticated agents send events and receive commands over plain HTTPS."""
