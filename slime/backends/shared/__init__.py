"""What backends share: of torch, not of one training library."""
