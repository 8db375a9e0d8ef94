"""The job runner: Linux processes run, stopped, watched and followed, over gRPC with mutual TLS or as a library."""
