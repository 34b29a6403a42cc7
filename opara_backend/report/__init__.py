"""What happened, for people and for tests."""
