"""Models small enough to ship with the package, so that a first try needs nothing but torch."""
