"""Processes on a cluster: place, start, connect, restart. The one folder that imports ray."""
