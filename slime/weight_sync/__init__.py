"""Named tensors from trainers to engines: gather, transport, version, checksum."""
