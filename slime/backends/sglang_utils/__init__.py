"""Stock SGLang as an engine: its flags and its command line. Nothing imports it: it runs in a process of its own."""
