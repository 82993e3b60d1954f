"""Engines: the client of the wire protocol and, in `embedded`, a small engine of our own. Importing this loads neither."""
