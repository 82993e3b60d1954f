"""Engines: the client of the wire protocol and, in `embedded`, an engine of our own. Importing this loads neither."""
