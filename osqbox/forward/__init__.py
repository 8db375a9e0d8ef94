"""Forwarding: what the box has recorded goes on to files, stdout, an HTTP collector or OpenSearch, at least once.

    osquery_logs ─┐                                   ┌─▶ file, rotated
    comms_events ─┼─▶ sources: rows after a cursor ─▶ delivery, one task per sink ─▶ stdout
    job output  ──┘                                   ├─▶ HTTP(S) collector
                                                      └─▶ OpenSearch `_bulk`

The record itself is the spool: a batch is read, sent, confirmed, and then the sink's cursor is moved in the database.
So nothing waits in memory but one batch per sink, a kill repeats at most that batch, and what retention removes before
a sink has confirmed it is counted as dropped.
"""
